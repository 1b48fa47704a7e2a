"""Weights are gathered in the type in which the forward pass reads them, gradients in float32."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from multiprocessing import get_context
from typing import Any
from unittest import mock

import pytest
import torch

from harness import engines
from harness.fake_ranks import fake_ranks
from harness.parity import (
    CASES,
    Case,
    Result,
    build,
    build_engine,
    configuration,
    run,
    train,
    whole_tensors,
)
from harness.pool import Distributed
from harness.sent import Sent
from seer_scale.parallel.zero_limits import with_limits
from seer_scale.planner.communication import messages
from seer_scale.planner.job import Batch, Layout, Zero
from seer_scale.planner.model import Model, shape_of
from seer_scale.train.build_engine import recompute_plan_of

CPU = torch.device("cpu")
HALF, FLOAT = 2, 4
STEPS = 7  # prototypes are frozen in the first five
# Nothing stays whole because it is small; everything stays whole from its first to its last use.
ZERO3 = Case("zero", zero={"stage": 3, "stage3_param_persistence_threshold": 0})
BF16: dict[str, Any] = {"train": {"precision": "bf16"}}


def padded_bytes(shards: int, rows: bool, low: int) -> int:
    """Bytes of all weights once, padded to equal slices: of rows, or of elements."""
    model = build("meta")
    names = {name for name, _ in model.named_modules()}
    total = 0
    for name, parameter in model.named_parameters():
        layer = name.rpartition(".")[0]
        assert layer in names
        module = model.get_submodule(layer)
        is_low = isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        row = parameter[0].numel() if rows else 1
        count = len(parameter) if rows else parameter.numel()
        total += -(-count // shards) * shards * row * (low if is_low else FLOAT)
    return total


def sent(case: Case, precision: str) -> dict[str, list[tuple[torch.dtype, int]]]:
    """The collectives of a step, the third."""
    config = configuration(case, train={"precision": precision})
    engine = build_engine(case, config, CPU)
    run(engine, config, 2, CPU)
    with Sent() as found:
        run(engine, config, 1, CPU)
    return dict(found.tensors)


@pytest.mark.parametrize(("precision", "low"), [("fp32", FLOAT), ("bf16", HALF)])
def test_fsdp_gathers_weights_in_the_type_of_the_forward_pass(
    distributed: Distributed, precision: str, low: int
) -> None:
    for found in distributed(sent, 2, CASES["fsdp"], precision):
        gathered = sum(size for _, size in found["all_gather"])
        assert gathered == 2 * padded_bytes(2, True, low)  # forward and backward
        assert len(found["all_gather"]) == 18  # no more than units: stem, six blocks, two of a head
        reduced = found["reduce_scatter"]
        assert {kind for kind, _ in reduced} == {torch.float32}
        assert sum(size for _, size in reduced) == padded_bytes(2, True, FLOAT)


@pytest.mark.parametrize(("precision", "low"), [("fp32", FLOAT), ("bf16", HALF)])
def test_zero3_gathers_weights_in_the_type_of_the_forward_pass(
    distributed: Distributed, precision: str, low: int
) -> None:
    for found in distributed(sent, 2, ZERO3, precision):
        assert sum(size for _, size in found["all_gather"]) == padded_bytes(2, False, low)
        assert {kind for kind, _ in found["reduce_scatter"]} == {torch.float32}


def test_fsdp_gathers_a_layer_that_is_a_unit_once_for_all_resolutions(
    distributed: Distributed,
) -> None:
    heavy = 1000  # all convolutions of the later stages, and those of squeeze-and-excitation
    units = build("meta").units(heavy)
    assert sum(isinstance(unit, torch.nn.Conv2d) for unit in units) > 20
    for found in distributed(sent, 2, Case("fsdp", sharding={"unit_parameters": heavy}), "fp32"):
        gathered = [size for _, size in found["all_gather"]]
        assert sum(gathered) == 2 * padded_bytes(2, True, FLOAT)  # forward and backward
        assert len(gathered) == 2 * (len(units) + 1)  # and the stem
        assert sum(size for _, size in found["reduce_scatter"]) == padded_bytes(2, True, FLOAT)


def sent_by_rank_0_of_64(name: str) -> dict[str, list[tuple[torch.dtype, int]]]:
    """The collectives of a forward and a backward pass."""
    with fake_ranks(64, 0):
        config = configuration(CASES[name], train={"precision": "bf16", "micro_batch_size": 2})
        engine = build_engine(CASES[name], config, CPU)
        with Sent() as found:
            _, scores = engine([torch.randn(4, 3, 64, 64), torch.randn(4, 3, 32, 32)], None)
            engine.backward(scores.square().mean())
        return dict(found.tensors)


@pytest.mark.parametrize(
    ("name", "shards"), [("fsdp", 64), pytest.param("hsdp(2x2)", 2, marks=pytest.mark.long)]
)
def test_many_ranks_gather_half_the_bytes(name: str, shards: int) -> None:
    with get_context("spawn").Pool(1) as pool:  # torch remembers the meshes of a process
        found = pool.apply(sent_by_rank_0_of_64, (name,))
    assert sum(size for _, size in found["all_gather"]) == 2 * padded_bytes(shards, True, HALF)
    assert sum(size for _, size in found["reduce_scatter"]) == padded_bytes(shards, True, FLOAT)
    assert {kind for kind, _ in found["reduce_scatter"]} == {torch.float32}


def train_zero3(steps: int) -> Result:
    config = configuration(ZERO3, **BF16)
    engine = build_engine(ZERO3, config, CPU)
    return Result(*run(engine, config, steps, CPU), whole_tensors(engine))


def assert_bitwise(actual: Result, expected: Result) -> None:
    assert actual.losses == expected.losses
    for name, value in expected.tensors.items():
        assert torch.equal(actual.tensors[name], value), name


@pytest.mark.parametrize(
    "job",
    [
        pytest.param(partial(train, "fsdp", "none", STEPS, **BF16), id="fsdp"),
        pytest.param(
            partial(train, "fsdp", "full", STEPS, **BF16), id="fsdp-full", marks=pytest.mark.long
        ),
        pytest.param(partial(train_zero3, STEPS), id="zero3", marks=pytest.mark.long),
    ],
)
def test_it_trains_to_the_same_bits_as_casting_after_the_gather(
    distributed: Distributed, job: Callable[[], Result]
) -> None:
    # ddp gathers nothing: autocast casts its float32 weights at every use, and the gradients of two
    # resolutions are added behind that cast.
    ddp = distributed(partial(train, "ddp", steps=STEPS, **BF16), 2)[0]
    assert_bitwise(distributed(job, 2)[0], ddp)


def test_a_budget_of_activations_counts_no_copies_of_weights_that_are_gathered_in_16_bit() -> None:
    def peak(name: str) -> int:
        plan = recompute_plan_of(configuration(CASES[name], "auto:1", **BF16), build)
        assert plan
        return plan.peak

    assert peak("fsdp") < peak("ddp") == peak("zero3")


# --------------------------------------------------------------------- stage 3's reuse distance


def limits(reuse: int | str) -> dict[str, Any]:
    """Settings of stage 3 without prefetching; the rule behind "auto" at the size of this model."""
    largest = max(sum(p.numel() for p in b.parameters()) for s in build("meta").blocks() for b in s)
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_live_parameters": reuse,
        "stage3_max_reuse_distance": reuse,
    }
    with mock.patch(f"{with_limits.__module__}.LEAST", 0):
        return with_limits(zero, largest)


def gathers(reuse: int | str, checkpointing: str) -> float:
    """How often a step gathers the model."""
    case = Case("zero", zero=limits(reuse))
    config = configuration(case, checkpointing)
    engine = build_engine(case, config, CPU)
    run(engine, config, 2, CPU)
    with Sent() as found:
        run(engine, config, 1, CPU)
    return float(found.bytes_of("all_gather") / padded_bytes(2, False, FLOAT))


def planned_gathers(reuse: int | str, checkpointing: str) -> float:
    """The same by the planner."""
    model = Model("regnety_debug", (32, 16), False, 12)
    layout = Layout("zero", 1, 2, 2, 0, True, 0, Zero.read(limits(reuse)))
    shape = shape_of(model, 10**9)
    blocks = range(len(shape.blocks)) if checkpointing == "full" else ()
    found = messages(
        shape,
        layout,
        Batch(4, 1, (64, 32), (2, 2), "fp32"),
        prototypes=12,
        sinkhorn=None,
        recomputed=frozenset(blocks),
    )
    sizes = [m.size * m.count for m in found if m.kind == "sharding"]
    return sum(sizes) / (FLOAT * shape.total)


@pytest.mark.long
@pytest.mark.parametrize(
    ("reuse", "checkpointing", "passes"),
    [
        # Once a pass: forward, backward, and before it recomputed. BatchNorm's few numbers come for
        # each resolution.
        (0, "none", 2.03),
        (0, "full", 3.02),
        # Once forward, and once backward but for the last block, which stays.
        ("auto", "none", 2),
        ("auto", "full", 2),
    ],
)
def test_a_reuse_distance_of_three_blocks_gathers_a_block_once_a_pass(
    distributed: Distributed, reuse: int | str, checkpointing: str, passes: float
) -> None:
    found = distributed(gathers, 2, reuse, checkpointing)[0]
    assert passes - 0.4 < found <= passes
    assert planned_gathers(reuse, checkpointing) == pytest.approx(found, rel=0.05)


def test_auto_follows_the_largest_block_from_200_million_on() -> None:
    zero = {
        "stage": 3,
        "stage3_prefetch_bucket_size": 5,
        "stage3_max_live_parameters": "auto",
        "stage3_max_reuse_distance": "auto",
    }
    assert with_limits(zero, 10**9) == {
        **zero,
        "stage3_max_live_parameters": 10**9 + 5,
        "stage3_max_reuse_distance": 3 * 10**9,
    }
    assert with_limits(zero, 1)["stage3_max_reuse_distance"] == 200_000_000
    assert with_limits(zero, 1)["stage3_max_live_parameters"] == 200_000_000
    given = {**zero, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 7}
    assert with_limits(given, 10**9) == given
    assert with_limits({**zero, "stage": 2}, 10**9)["stage3_max_reuse_distance"] == "auto"


def limits_of_a_run() -> tuple[int, int]:
    """What DeepSpeed has from ds_configs/zero3.json for a model whose largest block is patched."""
    line = [*engines.STRATEGIES["zero3"], *engines.TINY, "model.trunk=regnety_debug"]
    with mock.patch(f"{with_limits.__module__}.LEAST", 10):
        engine: Any = engines.build_engine(engines.configuration(*line))[0]
    own = engine._engine
    return own.zero_max_reuse_distance(), own.zero_max_live_parameters()


def test_a_run_computes_auto_from_its_own_model(distributed: Distributed) -> None:
    assert distributed(limits_of_a_run, 2)[0] == (3 * 69_806, 69_806 + 50_000_000)
