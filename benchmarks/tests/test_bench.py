"""The sections of `make bench` run, and the contenders of a section train the same."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks import peers
from benchmarks.train_step import arguments, our_step
from harness.engines import configuration
from harness.jobs import ROOT
from harness.pool import Distributed
from seer_scale.models import build_model, initialise


def _losses() -> tuple[list[float], list[float]]:
    model = build_model(
        "regnety_debug", head_dims=[512, 128], head_batch_norm=False, prototypes=3000
    )
    initialise(model, 0)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(n, 3, size, size, generator=generator) for n, size in ((4, 64), (8, 32))]
    ours = our_step(configuration(*arguments("regnety_debug", 2)))
    plain, _ = peers.plain_step(model, "regnety_debug", crops=6)
    assert dist.get_world_size() == 1
    return [float(ours(images)) for _ in range(4)], [float(plain(images)) for _ in range(4)]


def test_the_plain_loop_trains_as_this_project_does(distributed: Distributed) -> None:
    # Twelve images and BatchNorm: rounding grows from step to step, the first loss has little.
    ((ours, plain),) = distributed(_losses, 1)
    assert ours[0] == pytest.approx(plain[0], rel=1e-6)
    assert ours == pytest.approx(plain, rel=1e-3)
    assert len(set(ours)) == 4


@pytest.mark.slow
def test_the_gpu_bench_runs_and_ends_on_a_cpu() -> None:
    command = [sys.executable, "benchmarks/bench_gpu.py", "--device", "cpu", "--budget", "20"]
    done = subprocess.run(
        [*command, "--trunk", "regnety_debug", "--batch", "2"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 1 + 16 + 1
    assert "plain torchvision loop again" in rows[-1]
    assert any("align 8" in row and "not measured" not in row for row in rows)


def test_a_mistyped_section_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "stepp"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "no section 'stepp'" in done.stderr
