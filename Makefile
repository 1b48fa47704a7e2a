# Two verbs do all the set-up on a machine with Python 3.11+, make and git: `make demo`, `make test`.
PYTHON ?= python3
UV_VERSION := 0.13.9
# The environment, and the versions that are installed into it.
VENV ?= .venv
LOCK ?= requirements.lock
BIN := $(VENV)/bin
READY := $(VENV)/ready
BATCH ?= 16
MINUTES ?= 30
# Processes that run tests, or that `make mutants` plants mistakes in, at the same time.
JOBS ?= 2
# Settings of the tests: more threads than cores make multi-process tests slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=10
EXTRAS := --extra demo --extra dev --extra evaluation --extra heif --extra onnx
COMPILE := uv pip compile --quiet --python-version 3.11 --no-annotate --no-emit-index-url $(EXTRAS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all quick long coverage oldest test-slow test-processors check \
	format lock dist docker parity rg10b-plan gpu-10b gpu-check bench bench-gpu bench-memory \
	bench-loader docs elastic kill stall soak study audit mutants

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY)  ## install everything, pinned, into .venv
	@echo "ready: source $(VENV)/bin/activate, then seer-scale doctor; docs/quick-start.md goes on"

$(READY): $(LOCK) setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r $(LOCK)
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## pretrain on real photographs, register the model, compare its features
	$(BIN)/python launch/demo.py

test: check quick  ## lint, types and the quick tests

test-all: test long  ## the same, and the long tests that must pass before a merge

quick: $(READY)  ## every test but the long and the slow ones
	$(PYTEST)

long: $(READY)  ## the long tests
	$(PYTEST) -m "long and not slow"

coverage: $(READY)  ## the quick and the long tests, and the lines that they run (sooner with Python 3.12)
	COVERAGE_CORE=sysmon $(PYTEST) -m "not slow" --cov

oldest:  ## the quick tests at the oldest versions that setup.py allows, in .venv-oldest
	$(MAKE) quick VENV=.venv-oldest LOCK=.ci/oldest.lock

test-slow: $(READY)  ## the tests that take minutes each, and test-processors
	$(PYTEST) -m slow
	$(MAKE) test-processors

test-processors: $(READY)  ## the numeric tests with the kernels of lesser processors (TESTS="PATH ...")
	$(BIN)/python .ci/processors.py $(TESTS)

mutants: $(READY)  ## plant mistakes one by one; does a test notice each? docs/mutants.md
	$(BIN)/python benchmarks/mutants.py --jobs $(JOBS) --write

check: $(READY)  ## lint, format, spelling, workflows and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell $$(git ls-files)
	$(BIN)/actionlint -shellcheck=$(BIN)/shellcheck .github/workflows/*.yml
	$(BIN)/mypy

audit: $(READY)  ## known vulnerabilities of what the lock pins
	$(BIN)/python .ci/audit.py

format: $(READY)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY)  ## resolve setup.py and requirements.in into requirements.lock, and the oldest into .ci/
	$(BIN)/$(COMPILE) --universal --generate-hashes setup.py requirements.in -o requirements.lock
	$(BIN)/$(COMPILE) --resolution lowest-direct setup.py -o .ci/oldest.lock

dist: $(READY)  ## the source distribution and the wheel, into dist/
	$(BIN)/uv build --quiet --no-build-isolation --python $(BIN)/python --out-dir dist .

docs: $(READY)  ## the documentation as a site, into site/
	$(BIN)/python docs/generate_config.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

study: $(READY)  ## a scaling study of four sizes on the demo's photographs, with its report
	$(BIN)/python -c 'from pathlib import Path; from seer_scale.data import write_tiles; write_tiles(Path("data/demo"))'
	$(BIN)/python launch/scaling_study.py --study launch/studies/demo.yaml

elastic: $(READY)  ## the elastic matrix of docs/checkpoints.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/elastic.py --write

kill: $(READY)  ## kill a random rank 20 times and look for lost samples
	$(BIN)/python benchmarks/kill.py

soak: $(READY)  ## 2,000 steps with ranks, servers and disks that fail at random
	$(BIN)/python benchmarks/soak.py

stall: $(READY)  ## how long a save holds up the training
	$(BIN)/python benchmarks/stall.py --write

parity: $(READY)  ## every strategy against a plain loop: the tables of docs/sharding.md
	$(BIN)/python benchmarks/parity.py

rg10b-plan: $(READY)  ## RG-10B on 64 ranks, on paper and rank by rank: no GPU needed
	$(BIN)/python benchmarks/rg10b_plan.py

gpu-10b: $(READY)  ## three steps of RG-10B on one GPU of 130 GiB, or of 80 GB (BATCH=16)
	$(BIN)/python benchmarks/gpu_10b.py --batch $(BATCH)

gpu-check: $(READY)  ## what only GPUs can show, then the parity matrix on them (MINUTES=30)
	$(BIN)/python benchmarks/gpu_check.py --minutes $(MINUTES)

bench: $(READY)  ## a step and its parts beside what people would otherwise use: docs/performance.md
	$(BIN)/python benchmarks/bench.py --write

bench-gpu: $(READY)  ## seer_256gf on one GPU, choice by choice, in eight minutes
	$(BIN)/python benchmarks/bench_gpu.py --write

bench-memory: $(READY)  ## bytes per rank and activations of every strategy: the tables and the plot
	$(BIN)/python benchmarks/memory.py

bench-loader: $(READY)  ## images per second and core of the loader and of others: docs/data.md
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/loader.py

docker:  ## build the CUDA image
	docker build -t seer-scale .
