# Two verbs do all the set-up on a machine with Python 3.11+, make and git: `make demo`, `make test`.
PYTHON ?= python3
UV_VERSION := 0.13.9
BIN := .venv/bin
READY := .venv/ready
BATCH ?= 16
# Settings of the tests: more threads than cores make multi-process tests slower.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format lock docker parity rg10b-plan gpu-10b gpu-check \
	bench bench-gpu bench-memory bench-loader docs elastic kill stall soak study audit

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY)  ## install everything, pinned, into .venv

$(READY): requirements.lock setup.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 setup")'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation -e .
	@touch $@

demo: $(READY)  ## pretrain on real photographs, register the model, compare its features
	$(BIN)/python launch/demo.py

test: check  ## lint, types and every test but the slow ones
	$(PYTEST)

test-slow: $(READY)  ## the tests that take minutes each
	$(PYTEST) -m slow

check: $(READY)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

audit: $(READY)  ## known vulnerabilities of what the lock pins
	$(BIN)/python .ci/audit.py

format: $(READY)  ## rewrite the code in the house format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: $(READY)  ## resolve setup.py and requirements.in into requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
		--no-emit-index-url --extra demo --extra dev --extra evaluation --extra onnx setup.py requirements.in -o requirements.lock

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

gpu-check: $(READY)  ## the parity matrix on this machine's GPUs
	$(BIN)/python benchmarks/gpu_check.py

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
