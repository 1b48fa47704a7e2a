"""What an engine owes the trainer beside the right numbers: freezing, accumulation, unit rows.

That every strategy equals a plain loop is tests/parallel/test_parity.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.jobs import ROOT
from harness.parity import (
    CASES,
    CROPS,
    LR,
    Case,
    K,
    build_engine,
    configuration,
    my_crops,
    whole_tensors,
)
from harness.pool import Distributed
from seer_scale.objectives.swav import SwAV
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.parallel.build_optimizer import PROTOTYPES

CPU = torch.device("cpu")


def frozen_state(name: str) -> list[tuple[float, float]]:
    """For each of three frozen steps: how far the prototypes moved, and their momentum."""
    engine = build_engine(CASES[name], configuration(CASES[name]), CPU)
    start = {part.name: part.values.clone() for part in engine.slices()}
    objective, result = SwAV(crops=sum(CROPS)), []
    for step in range(3):
        apply_schedule(engine.param_groups, lr=LR, frozen=PROTOTYPES)
        loss, _ = objective(*engine(my_crops(step, CPU), None))
        engine.backward(loss)
        engine.step()
        moved = {
            part.name: (
                float((part.values - start[part.name]).abs().max()),
                float(part.momentum.abs().max()),
            )
            for part in engine.slices()
        }
        result += [moved[name] for name in PROTOTYPES & moved.keys()]
        assert any(distance > 0 for distance, _ in moved.values())
    return result


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_frozen_prototypes_keep_values_and_gather_no_momentum(
    distributed: Distributed, name: str
) -> None:
    # Under ZeRO 2 one rank alone may hold them.
    found = [state for rank in distributed(frozen_state, 2, name) for state in rank]
    assert len(found) >= 3
    assert set(found) == {(0.0, 0.0)}


def accumulated(name: str, parts: int) -> list[Any]:
    """A batch in `parts`, through a model in eval mode: its micro-batches do not see each other."""
    case = CASES[name]
    config = configuration(case, train={"gradient_accumulation": parts})
    engine = build_engine(case, config, CPU)
    engine.model.eval()
    norms = []
    for step in range(2):
        apply_schedule(engine.param_groups, lr=LR)
        for part in range(parts):
            _, scores = engine(my_crops(step, CPU, part, parts), None)
            engine.backward(scores.square().mean() * K)
            norm = engine.step()
            assert (norm is not None) == (part == parts - 1)
        assert norm is not None
        norms.append(float(norm))
    return [norms, whole_tensors(engine)]


@pytest.mark.parametrize(
    "name", ["ddp", "fsdp", pytest.param("zero1", marks=pytest.mark.slow), "zero2", "zero3"]
)
def test_accumulation_equals_the_whole_batch(distributed: Distributed, name: str) -> None:
    (norms, tensors), _ = distributed(accumulated, 2, name, 1)
    (norms2, tensors2), _ = distributed(accumulated, 2, name, 2)
    assert norms2 == pytest.approx(norms, rel=1e-4)
    for key, value in tensors.items():
        torch.testing.assert_close(tensors2[key], value, rtol=1e-4, atol=1e-5, msg=key)
    torch.testing.assert_close(tensors2["prototypes.weight"].norm(dim=1), torch.ones(K))


# Stage 3 that keeps nothing for later.
EAGER = Case(
    "zero",
    zero={
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    },
)


def still_whole(checkpointing: str) -> list[float]:
    """Of each of two steps: the share of weights that is whole when the first block is reached."""
    engine = build_engine(EAGER, configuration(EAGER, checkpointing), CPU)
    own: list[Any] = list(engine.model.parameters())
    found: list[float] = []

    def look(_: object) -> None:
        whole = sum(p.ds_numel for p in own if p.ds_status.name == "AVAILABLE")
        found.append(whole / sum(p.ds_numel for p in own))

    engine.model.blocks()[0][0].f.a[0].weight.register_hook(look)  # type: ignore[operator]
    for step in range(2):
        apply_schedule(engine.param_groups, lr=LR)
        _, scores = engine(my_crops(step, CPU), None)
        engine.backward(scores.square().mean())
        engine.step()
    return found


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_stage_3_frees_a_layer_that_two_resolutions_go_through(
    distributed: Distributed, checkpointing: str
) -> None:
    assert len(CROPS) == 2
    for first, second in distributed(still_whole, 2, checkpointing):
        assert 0 < first < 0.05
        assert 0 < second < 0.05


def running_mean(group_size: int) -> list[float]:
    """Running mean of the first BatchNorm, after a forward pass over this rank's own images."""
    case = CASES["ddp"]
    config = configuration(case, sharding={"sync_bn_group_size": group_size})
    engine = build_engine(case, config, CPU)
    engine(my_crops(0, CPU), None)
    means = (v for k, v in engine.model.named_buffers() if k.endswith("running_mean"))
    return next(means).tolist()


def test_batch_norm_counts_the_images_of_its_group(distributed: Distributed) -> None:
    """With groups of one rank the ranks' statistics differ, since their images do."""
    alone = distributed(running_mean, 2, 1)
    together = distributed(running_mean, 2, 0)
    assert together[0] == together[1]
    assert alone[0] != alone[1]
    both = torch.tensor(alone).mean(dim=0)
    torch.testing.assert_close(torch.tensor(together[0]), both)


STRIDED = """
import torch, torch.distributed as dist
from seer_scale.parallel.torch_engine import wrap_ddp
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
conv = wrap_ddp(torch.nn.Conv2d(8, 16, 1, stride=2, bias=False), torch.device("cpu"))
images = torch.randn(2, 8, 8, 8).contiguous(memory_format=torch.channels_last)
conv(images.requires_grad_()).sum().backward()
"""


def test_ddp_does_not_warn_of_strides_that_say_nothing() -> None:
    """In a process of its own: torch warns once in each."""
    done = subprocess.run(
        [sys.executable, "-c", STRIDED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "stride" not in done.stderr


def order_after_the_update(name: str) -> list[str]:
    """What a step of this rank does last, as on a GPU: its update, waits, and gathers."""
    engine: Any = build_engine(CASES[name], configuration(CASES[name]), CPU)
    apply_schedule(engine.param_groups, lr=LR)
    loss, _ = SwAV(crops=sum(CROPS))(*engine(my_crops(0, CPU), None))
    engine.backward(loss)
    done: list[str] = []

    def noting(what: str, function: Any = lambda *_: None) -> Any:
        def noted(*args: Any, **more: Any) -> Any:
            done.append(what)
            return function(*args, **more)

        return noted

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine._engine, "step", noting("update", engine._engine.step))
        if engine._persistent:
            first = engine._persistent[0]
            first.all_gather_coalesced = noting("gather", first.all_gather_coalesced)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(
            torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=noting("wait"))
        )
        engine.step()
    return done


@pytest.mark.parametrize(
    ("name", "order"),
    [("zero3", ["update", "wait", "gather"]), ("zero2", ["update"])],
)
def test_stage_3_gathers_what_has_been_updated(
    distributed: Distributed, name: str, order: list[str]
) -> None:
    """DeepSpeed gathers on another stream of the GPU, which does not wait for the update."""
    assert distributed(order_after_the_update, 2, name) == [order] * 2
