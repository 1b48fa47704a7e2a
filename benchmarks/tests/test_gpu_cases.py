"""The cases of `make gpu-check` beside the matrix, on a CPU: they pass, and they see mistakes."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch

from benchmarks import gpu_cases
from benchmarks.gpu_cases import extras
from benchmarks.gpu_check import extra_variants
from benchmarks.gpu_rows import EXTRAS
from harness import parity
from harness.gpu_kernels import with_gpu_kernels
from harness.pool import Distributed
from seer_scale.optim.parts import Part
from seer_scale.optim.slice_sgd import SliceSGD
from seer_scale.parallel.batchnorm_gpu import MOST_GATHERED

CPU = torch.device("cpu")
QUICK = [name for name in extras() if name.startswith(("syncbn", "pinned"))]


def answers(names: list[str]) -> dict[str, str | None]:
    return {name: extras()[name].run(CPU) for name in names}


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_batchnorm_and_pinned_images(distributed: Distributed, world_size: int) -> None:
    for found in distributed(answers, world_size, QUICK):
        assert found == dict.fromkeys(QUICK)


@pytest.mark.parametrize("world_size", [1, 2])
def test_batchnorm_with_the_kernels_of_gpus(distributed: Distributed, world_size: int) -> None:
    names = [name for name in QUICK if "syncbn" in name]
    for found in distributed(with_gpu_kernels, world_size, MOST_GATHERED, answers, names):
        assert found == dict.fromkeys(names)


def with_local_batchnorm() -> dict[str, str | None]:
    with patch("benchmarks.gpu_cases.convert_sync_batchnorm", lambda model, _: model):
        return answers(QUICK)


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
    names = [name for name in extras() if name.startswith(f"skip {strategy},")]
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
