"""RG-10B on 64 ranks: slices of all ranks make the model once; gathered bytes equal FSDP's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import rg10b_plan as plan
from harness import parity
from harness.fake_ranks import fake_ranks
from seer_scale.config import RunConfig
from seer_scale.models import initialise
from seer_scale.parallel.convert_batchnorm import sync_group
from seer_scale.train import build

GIB = 2**30


# Five prototypes on eight ranks, eight rows in a first block: empty and uneven shards.
SMALL = ("regnety_200mf", "model.head_dims=[32, 16]", "model.prototypes=5")
RANKS = 8


def hold(rank: int) -> tuple[list[tuple[str, int, Any, Any]], dict[str, Any]]:
    """A rank's slices (name, offset, values, momentum) and buffers, as NumPy."""
    with fake_ranks(RANKS, rank):
        engine = plan.build_engine(plan.configuration(*SMALL))
        parts = [
            (part.name, part.offset, part.values.numpy(), part.momentum.numpy())
            for part in engine.slices()
        ]
        return parts, {name: buffer.numpy() for name, buffer in engine.model.named_buffers()}


@pytest.fixture
def alone() -> Callable[..., list[Any]]:
    """`alone(function, arguments)`: each call in a fresh process, since torch remembers meshes."""
    context = get_context("forkserver")
    context.set_forkserver_preload([plan.__name__])

    def run(function: Callable[[Any], Any], arguments: Iterable[Any]) -> list[Any]:
        with ProcessPoolExecutor(2, mp_context=context, max_tasks_per_child=1) as pool:
            return list(pool.map(function, arguments))

    return run


@pytest.mark.long
def test_slices_of_all_ranks_make_the_whole_model_once(alone: Callable[..., list[Any]]) -> None:
    config = plan.configuration(*SMALL)
    expected = build.model_of(config, torch.device("cpu"))
    initialise(expected, config.run.seed)
    whole = dict(expected.named_parameters())
    seen = {name: np.zeros(p.numel(), dtype=int) for name, p in whole.items()}
    found = {name: np.zeros(p.numel(), dtype=np.float32) for name, p in whole.items()}
    counts = []
    for parts, buffers in alone(hold, range(RANKS)):
        for name, offset, values, momentum in parts:
            seen[name][offset : offset + len(values)] += 1
            found[name][offset : offset + len(values)] = values
            assert momentum.shape == values.shape
            assert not momentum.any()
        for name, buffer in expected.named_buffers():
            assert np.array_equal(buffers[name], buffer), name
        counts.append(len(parts))
    assert max(counts) == len(whole)
    assert min(counts) < len(whole)  # or there is no empty shard to be right about
    for name, parameter in whole.items():
        assert (seen[name] == 1).all(), name
        assert np.array_equal(found[name], parameter.detach().flatten()), name


def members(rank: int) -> list[int]:
    with fake_ranks(64, rank):
        group = sync_group(8)
        assert group is not None
        return dist.get_process_group_ranks(group)


@pytest.mark.long
def test_batchnorm_groups_of_eight_on_64_ranks(alone: Callable[..., list[Any]]) -> None:
    groups = [list(range(8)), list(range(8, 16)), list(range(56, 64))]
    assert alone(members, [0, 13, 63]) == groups


def rows_here(rows: int, ranks: int, rank: int) -> int:
    """Rows of a tensor that torch's Shard(0) leaves on a rank: equal runs, the last ones short."""
    each = math.ceil(rows / ranks)
    return min(max(rows - rank * each, 0), each)


def bytes_expected(config: RunConfig, ranks: int, rank: int) -> int:
    model = build.model_of(config, torch.device("meta"))
    return 4 * sum(
        rows_here(p.shape[0], ranks, rank) * math.prod(p.shape[1:]) for p in model.parameters()
    )


def check_rank(measured: plan.Rank, config: RunConfig, ranks: int) -> None:
    expected = bytes_expected(config, ranks, measured.rank)
    assert measured.parameters == measured.momentum == expected
    assert sum(4 * unit.here for unit in measured.units) == expected
    # Weights and momentum are really there; and nothing much besides.
    assert measured.peak - measured.imports > 2 * expected
    assert measured.peak < plan.LIMIT_GIB * GIB
    whole = sum(p.numel() for p in build.model_of(config, torch.device("meta")).parameters())
    assert sum(unit.parameters for unit in measured.units) == whole


def test_a_small_plan() -> None:
    config = plan.configuration("regnety_200mf")
    (measured,) = plan.measure_alone("regnety_200mf", 8, [3])
    check_rank(measured, config, 8)
    text = plan.describe("regnety_200mf", 8, [measured])
    # 72,237,312 parameters of 2 bytes gathered, and of 4 bytes on the rank.
    assert "| `head` | 6 | 72,237,312 | 0.135 | 34.45 |" in text
    assert "67,117,056 parameters" in text  # the head's second layer, 8192 x 8192 + 8192


@pytest.mark.slow
def test_no_rank_of_rg10b_takes_two_gib() -> None:
    config = plan.configuration("rg_10b")
    for measured in plan.measure_alone("rg_10b", 64, [0, 63]):
        check_rank(measured, config, 64)
        assert measured.buffers < 0.01 * GIB


# ------------------------------------------------------------------------------- gathered at once


class _Watch(TorchDispatchMode):
    """Most bytes of float32 that FSDP2 holds whole, looked at before every operation."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        states = [m._get_fsdp_state() for m in model.modules() if isinstance(m, FSDPModule)]
        self.groups = [s._fsdp_param_group for s in states if s._fsdp_param_group]
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        whole = [g for g in self.groups if g.is_unsharded or g._all_gather_result is not None]
        now = 4 * sum(p.sharded_param.numel() for g in whole for p in g.fsdp_params)
        self.most = max(self.most, now)
        return func(*args, **(kwargs or {}))


def _watched(heavy: int, prefetch: int) -> tuple[int, int, int, int]:
    """Predicted and seen bytes that are whole at once, in a forward and a backward pass."""
    case = parity.CASES["fsdp"]
    sharding = {"strategy": "fsdp", "unit_parameters": heavy, "prefetch": prefetch}
    config = parity.configuration(case, sharding={**sharding, "activation_checkpointing": "full"})
    engine = parity.build_engine(case, config, torch.device("cpu"))
    model: Any = engine.model
    gathered = plan.gathered_at_once(model, config)
    region = plan.largest_region(model, config)
    region += 4 * sum(p.numel() for p in model.trunk.stem.parameters())  # what is left stays whole
    with _Watch(model) as forward:
        _, scores = engine(parity.my_crops(0, torch.device("cpu")), None)
    with _Watch(model) as backward:
        engine.backward(scores.sum())
    return gathered, forward.most, region, backward.most


@pytest.mark.parametrize(
    ("heavy", "prefetch"),
    [
        (20_000, 1),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((10**9, 1), (3_000, 0), (3_000, 2))
        ),
    ],
)
def test_what_is_gathered_at_once_is_what_fsdp_does(
    distributed: Callable[..., list[Any]], heavy: int, prefetch: int
) -> None:
    gathered, seen, region, seen_backward = distributed(_watched, 2, heavy, prefetch)[0]
    assert gathered == seen
    assert seen_backward >= region
