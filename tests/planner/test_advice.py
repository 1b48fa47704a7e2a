"""Advice after out of memory: equals the planner's figures; a run without memory prints it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from harness.jobs import RECIPES, ROOT, arguments, write_images
from seer_scale.config.recipe import parse
from seer_scale.planner.advice import is_out_of_memory, out_of_memory
from seer_scale.planner.plan import plan

GIB = 2**30
SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"


def advice(*overrides: str, ranks: int = 8) -> str:
    config = parse(
        ["--recipe", "swav_in1k_regnety_16gf", *overrides], recipes=RECIPES, ranks=ranks
    ).config
    error = torch.OutOfMemoryError(SAID)
    assert is_out_of_memory(error)
    planner = partial(plan, config, nodes=1, gpus_per_node=ranks)
    return out_of_memory(error, planner, cuda=True)


def total(*overrides: str, strategy: str | None = None) -> float:
    where: dict[str, Any] = {"nodes": 1, "gpus_per_node": 8, "strategy": strategy}
    memory = plan("swav_in1k_regnety_16gf", "h100_80gb", overrides=overrides, **where).memory
    return memory.total / GIB


@pytest.mark.long
def test_every_knob_frees_what_the_planner_says() -> None:
    base = ("sharding.sync_bn_group_size=0", "sharding.activation_checkpointing=none")
    said = advice(*base)
    assert "ran out of GPU memory (CUDA out of memory)" in said
    own = total(*base, strategy="ddp")
    assert f"counts {own:.3g} GiB" in said
    half = total(*base, "train.micro_batch_size=32", "train.gradient_accumulation=16")
    full = total("sharding.sync_bn_group_size=0", "sharding.activation_checkpointing=full")
    sharded = total(*base, strategy="fsdp")
    freed = {
        "train.micro_batch_size=32 with train.gradient_accumulation=16": own - half,
        "sharding.activation_checkpointing=full": own - full,
        "sharding.strategy=fsdp": own - sharded,
    }
    named = dict(re.findall(r"(?:; |, )([a-z][^,;]*?) frees ([\d.]+) GiB", said))
    assert {name: float(gib) for name, gib in named.items()} == {
        name: float(f"{gib:.3g}") for name, gib in freed.items() if gib > 0.01 * own
    }
    assert len(named) >= 2
    assert list(named) == sorted(named, key=lambda name: -float(named[name]))  # the most first


def test_what_the_planner_does_not_know_is_said() -> None:
    said = advice("sharding.strategy=fairscale")
    assert "the planner cannot say more" in said
    assert "lower train.micro_batch_size" in said


def test_other_errors_are_not_about_memory() -> None:
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


# In the third step this process may take no more than a little beside what it has.
PLUGIN = """
import resource
from seer_scale.objectives import SwAV

class Greedy(SwAV):
    calls = 0

    def __call__(self, embeddings, scores):
        self.calls += 1
        if self.calls == 3:
            pages = int(open("/proc/self/statm").read().split()[0])
            limit = pages * resource.getpagesize() + (64 << 20)
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
            try:
                scores = scores.repeat(1 << 20, 1 << 8)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)
        return super().__call__(embeddings, scores)
"""


@pytest.mark.long
@pytest.mark.launch
def test_a_run_without_memory_ends_with_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text(PLUGIN)
    metadata = tmp_path / "greedy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[seer_scale.objectives]\ngreedy=greedy:Greedy\n")
    argv = arguments(write_images(tmp_path / "images"), tmp_path / "run", "objective.name=greedy")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "error: a rank ran out of host memory" in done.stderr
    assert "train.micro_batch_size=2 with train.gradient_accumulation=2 frees" in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_s_error_is_recognised() -> None:
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(torch.OutOfMemoryError) as raised:
            torch.empty(torch.cuda.get_device_properties(0).total_memory // 2, dtype=torch.uint8,
                        device="cuda")  # fmt: skip
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert is_out_of_memory(raised.value)
