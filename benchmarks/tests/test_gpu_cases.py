"""The cases of `make gpu-check` beside the matrix, on a CPU: they pass, and they see mistakes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from benchmarks import gpu_cases
from benchmarks.gpu_check import extra_variants, reason_to_skip
from benchmarks.gpu_rows import EXTRAS, Variant
from harness import parity
from harness.gpu_kernels import with_gpu_kernels
from harness.pool import Distributed
from seer_scale.optim.parts import Part
from seer_scale.optim.slice_sgd import SliceSGD
from seer_scale.parallel.batchnorm_gpu import MOST_GATHERED

CPU = torch.device("cpu")
# Those of 2**31 elements are run with fewer.
QUICK = [name for name in EXTRAS if name.startswith(("syncbn", "pinned")) and "2**31" not in name]


def answers(names: list[str]) -> dict[str, str | None]:
    return {name: EXTRAS[name].run(CPU) for name in names}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batchnorm_and_pinned_images(distributed: Distributed, world_size: int) -> None:
    for found in distributed(answers, world_size, QUICK):
        assert found == dict.fromkeys(QUICK)


@pytest.mark.parametrize("world_size", [1, 2])
def test_batchnorm_with_the_kernels_of_gpus(distributed: Distributed, world_size: int) -> None:
    names = [name for name in QUICK if "syncbn" in name]
    for found in distributed(with_gpu_kernels, world_size, MOST_GATHERED, answers, names):
        assert found == dict.fromkeys(names)


def large(shape: tuple[int, int, int, int]) -> dict[str, str | None]:
    cases: Any = {name: EXTRAS[name].run for name in EXTRAS if "2**31" in name}
    assert len(cases) == 2
    return {name: case(CPU, shape=shape) for name, case in cases.items()}


@pytest.mark.parametrize("world_size", [1, 2])
def test_batchnorm_of_many_elements_with_fewer(distributed: Distributed, world_size: int) -> None:
    for found in distributed(with_gpu_kernels, world_size, MOST_GATHERED, large, (2, 8, 6, 5)):
        assert set(found.values()) == {None}


def test_what_needs_more_memory_of_a_gpu_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    assert math.prod(gpu_cases.LARGE) > 2**31
    variants = [Variant(name) for name in EXTRAS if "2**31" in name]
    if not torch.cuda.is_available():
        whys = [reason_to_skip(variant, cuda=False) for variant in variants]
        assert whys == ["needs 40 GiB of free GPU memory, not 0.0"] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 30 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2 * 2**30)
    for free, expected in ((13, None), (11.9, "needs 40 GiB of free GPU memory, not 39.9")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda f=free: (int(f * 2**30), 80 * 2**30))
        assert [reason_to_skip(variant, cuda=True) for variant in variants] == [expected] * 2


def record_of_collectives() -> list[str | None]:
    right = gpu_cases.record_of_collectives(CPU)
    with patch.object(dist, "all_reduce"):  # whatever came before is not an all-reduce of [7, 3]
        dist.broadcast(torch.ones(2), src=0)
        return [right, gpu_cases.record_of_collectives(CPU)]


def test_the_record_of_collectives(distributed: Distributed) -> None:
    for right, wrong in distributed(record_of_collectives, 2):
        assert right is None
        assert wrong is not None
        assert "it says 'in none, after broadcast " in wrong


@pytest.mark.parametrize("called", [True, False])
def test_the_snapshot_of_full_memory(monkeypatch: pytest.MonkeyPatch, called: bool) -> None:
    """A CPU refuses the allocation too; its observers are not torch's to call."""

    def attach(observer: Callable[..., None]) -> None:
        if called:
            observer(0, 2**50, 2**36, 2**20)

    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", attach, raising=False)
    found = EXTRAS["snapshot of full memory"].run(CPU)
    assert found == (None if called else "no snapshot was written")


def with_local_batchnorm() -> dict[str, str | None]:
    with patch("benchmarks.gpu_cases.convert_sync_batchnorm", lambda model, _: model):
        return answers(QUICK) | large((2, 8, 6, 5))


def test_a_layer_that_does_not_synchronise_is_seen(distributed: Distributed) -> None:
    for found in distributed(with_local_batchnorm, 2):
        for name, wrong in found.items():
            synchronised = "syncbn" in name and "one rank" not in name
            assert (wrong is not None) is synchronised, name
            if wrong:
                assert "output differs by " in wrong


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_steps_that_must_not_count(distributed: Distributed, strategy: str) -> None:
    names = [name for name in EXTRAS if name.startswith(f"skip {strategy},")]
    assert len(names) == 3
    if strategy == "ddp":
        names.append("momentum on the host")
    for found in distributed(answers, 2, names):
        assert found == dict.fromkeys(names)


def without_a_guard(kind: str) -> str | None:
    real: Any = SliceSGD._update

    def careless(self: SliceSGD, parts: list[Part]) -> None:
        for part in parts:
            part.holder.grad.nan_to_num_(nan=1.0, posinf=1.0, neginf=1.0)  # type: ignore[union-attr]
        real(self, parts)

    SliceSGD._update = careless  # type: ignore[method-assign]
    try:
        return gpu_cases.skip("ddp", kind, CPU)
    finally:
        SliceSGD._update = real  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["NaN loss", "infinite gradient on one rank"])
def test_a_step_that_counts_is_seen(distributed: Distributed, kind: str) -> None:
    for wrong in distributed(without_a_guard, 2, kind):
        assert wrong is not None
        assert "it moved " in wrong
        assert "so that it counts as good" in wrong


def test_every_strategy_has_its_cases_in_a_group_of_its_own() -> None:
    groups = extra_variants()
    assert [variant.case for group in groups for variant in group] == list(EXTRAS)
    for group in groups:
        assert len({EXTRAS[variant.case].strategy for variant in group}) == 1
    for strategy in parity.CASES:
        if "nvme" not in strategy:
            assert f"timeouts {strategy}" in EXTRAS
            for kind in gpu_cases.KINDS:
                assert f"skip {strategy}, {kind}" in EXTRAS
