"""The parity matrix (see parity.py): a telling part here, the whole of it among the slow tests."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch

from harness.nvme import COMPILING_SECONDS, prepare_nvme
from harness.parity import (
    CASES,
    STEPS,
    Result,
    plain_loop,
    train,
    worst_loss,
    worst_tensor,
)
from harness.pool import Distributed

# float32 sums in another order (BatchNorm over ranks, weight gradients over parts of a batch),
# which 20 steps of a BatchNorm network amplify; a mistake is at least ten times as large (below).
TOLERANCE = 1e-4
FEW = 10  # steps of the part that is always run; prototypes are frozen in the first five


@cache
def expected(steps: int) -> Result:
    return plain_loop(steps)


def assert_like_the_plain_loop(actual: Result) -> None:
    plain = expected(len(actual.losses))
    assert worst_loss(actual.losses, plain.losses) < TOLERANCE
    parameters, buffers = worst_tensor(actual.tensors, plain.tensors)
    assert parameters < TOLERANCE
    assert buffers < TOLERANCE
    assert actual.norms == pytest.approx(plain.norms, rel=1e-2)  # logged, not trained on


def assert_bitwise(actual: Result, other: Result) -> None:
    assert actual.losses == other.losses
    for name, value in other.tensors.items():
        assert torch.equal(actual.tensors[name], value), name


@pytest.mark.parametrize("mistake", ["larc", "rows", "frozen", "momentum"])
def test_the_comparison_tells_a_mistake(mistake: str) -> None:
    wrong, right = plain_loop(mistake=mistake), expected(STEPS)
    off = max(worst_loss(wrong.losses, right.losses), *worst_tensor(wrong.tensors, right.tensors))
    assert off > 10 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("fsdp", "full"), ("zero2", "none"), ("zero3", "full")],
)
def test_strategy_equals_plain_loop(
    distributed: Distributed, name: str, checkpointing: str
) -> None:
    ranks = distributed(train, 2, name, checkpointing, FEW)
    assert_like_the_plain_loop(ranks[0])
    assert ranks[1].losses == ranks[0].losses
    # Stricter than any tolerance: norms are summed in float64, so that on two ranks every strategy
    # takes the very same steps.
    assert_bitwise(ranks[0], distributed(train, 2, "ddp", "none", FEW)[0])


# Of stages of 1, 2 and 3 blocks.
GROUPS: dict[str, Any] = {"sharding": {"checkpoint_groups": [[1], [1, 2], [2]]}}


@pytest.mark.parametrize(
    "name",
    ["fsdp", *(pytest.param(n, marks=pytest.mark.slow) for n in ("ddp", "hsdp(2x2)", "zero3"))],
)
def test_groups_of_sharded_blocks_are_recomputed(distributed: Distributed, name: str) -> None:
    job = partial(train, name, "groups", FEW, **GROUPS)
    assert_like_the_plain_loop(distributed(job, CASES[name].world_size)[0])


@pytest.mark.long
@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_world_size_does_not_matter(distributed: Distributed, world_size: int) -> None:
    assert_like_the_plain_loop(distributed(train, world_size, "fsdp", "none", FEW)[0])


@pytest.mark.long
def test_hybrid_sharding_equals_plain_loop(distributed: Distributed) -> None:
    assert_like_the_plain_loop(distributed(train, 4, "hsdp(2x2)", "full", FEW)[0])


FUSED: dict[str, Any] = {"optim": {"fuse_backward": True}}


@pytest.mark.parametrize(
    ("name", "world_size"),
    [("ddp", 1), ("fsdp", 2), pytest.param("hsdp(2x2)", 4, marks=pytest.mark.slow)],
)
def test_optimizer_in_the_backward_pass_is_the_same_step(
    distributed: Distributed, name: str, world_size: int
) -> None:
    plain = distributed(train, world_size, name, "full", 8)[0]
    fused = distributed(fused_training, world_size, name)[0]
    assert_bitwise(fused, plain)
    assert fused.norms == pytest.approx(plain.norms, rel=1e-6)


def fused_training(name: str) -> Result:
    return train(name, "full", 8, **FUSED)


@pytest.mark.slow
@pytest.mark.timeout(COMPILING_SECONDS + 1600)
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("name", CASES)
def test_whole_matrix(distributed: Distributed, name: str, checkpointing: str) -> None:
    if name == "zero3+nvme":
        prepare_nvme()
    ranks = distributed(train, CASES[name].world_size, name, checkpointing)
    assert_like_the_plain_loop(ranks[0])


@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero1", "zero2", "zero3"])
def test_every_world_size_of_every_strategy(distributed: Distributed, name: str) -> None:
    for world_size in (1, 2, 4):
        assert_like_the_plain_loop(distributed(train, world_size, name)[0])
