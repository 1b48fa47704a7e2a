"""Every strategy against a plain loop: SwAV-like steps with LARC, freezing and unit-norm rows.

The oracle uses torch's own BatchNorm on the whole batch, whole tensors and LARC's formula written
out; nothing of it comes from the package but the bare model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale.config import RunConfig
from seer_scale.models import MultiCropModel, build_model, initialise, seeded_values
from seer_scale.optim import apply_schedule
from seer_scale.parallel import distributed as dist
from seer_scale.parallel.engine import PROTOTYPES, Engine, shard

Distributed = Callable[..., list[Any]]
SOURCE = partial(seeded_values, seed=0)
STEPS, BATCH, FROZEN, LR, MOMENTUM, DECAY, TRUST = 5, 8, 2, 0.02, 0.9, 1e-3, 1e-2


def build(device: torch.device | str) -> MultiCropModel:
    return build_model(
        "regnety_debug", head_dims=[32, 16], head_batch_norm=True, prototypes=12, device=device
    )


def step_data(step: int) -> tuple[list[Tensor], Tensor]:
    """Crops per resolution [count, BATCH, 3, s, s] and a target prototype per image."""
    generator = torch.Generator().manual_seed(step)
    crops = [
        torch.randn(count, BATCH, 3, size, size, generator=generator)
        for count, size in ((2, 64), (1, 32))
    ]
    return crops, torch.randint(0, 12, (BATCH,), generator=generator)


def loss_of(scores: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(scores / 0.1, targets.repeat(3))


def oracle() -> tuple[list[float], list[float], dict[str, Tensor]]:
    model = build("cpu")
    initialise(model, 0)
    momenta: dict[str, Tensor] = {}
    losses, norms = [], []
    for step in range(STEPS):
        crops, targets = step_data(step)
        _, scores = model([crop.flatten(0, 1) for crop in crops])
        loss = loss_of(scores, targets)
        model.zero_grad()
        loss.backward()
        squares = []
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name == "prototypes.weight" and step < FROZEN:
                    continue
                g, pn, gn = p.grad, p.norm(), p.grad.norm()
                squares.append(gn**2)
                if pn > 0 and gn > 0:
                    g = TRUST * pn / (gn + DECAY * pn + 1e-8) * (g + DECAY * p)
                m = momenta[name] = MOMENTUM * momenta.get(name, torch.zeros_like(p)) + g
                p -= LR * m
                if name == "prototypes.weight":
                    p /= p.norm(dim=1, keepdim=True)
        losses.append(loss.item())
        norms.append(float(sum(squares)) ** 0.5)
    return losses, norms, {k: v.detach() for k, v in model.state_dict().items()}


def configuration(strategy: str, accumulation: int = 1, checkpointing: str = "none") -> RunConfig:
    world = dist.world_size()
    return RunConfig.model_validate(
        {
            "recipe": "test",
            "run": {"dir": "unused"},
            "train": {
                "steps": STEPS,
                "micro_batch_size": BATCH // world // accumulation,
                "gradient_accumulation": accumulation,
            },
            "model": {"trunk": "regnety_debug", "head_dims": [32, 16], "prototypes": 12},
            "objective": {},
            "optim": {
                "momentum": MOMENTUM,
                "weight_decay": DECAY,
                "trust_coefficient": TRUST,
                "freeze_prototypes_steps": FROZEN,
            },
            "sharding": {
                "strategy": "zero" if "zero" in strategy else strategy,
                "deepspeed_config": "unused.json" if "zero" in strategy else None,
                "activation_checkpointing": checkpointing,
            },
            "data": {"path": "unused", "crop_sizes": [64, 32], "crop_counts": [2, 1]},
            "checkpoint": {},
            "tracking": {},
        }
    )


def ds_config(strategy: str, config: RunConfig) -> dict[str, Any] | None:
    if "zero" not in strategy:
        return None
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": config.train.gradient_accumulation,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
        "zero_optimization": {
            "stage": int(strategy[-1]),
            "reduce_bucket_size": 1_000_000,
            **({"compute_grad_norm": False} if strategy in ("zero1", "zero2") else {}),
        },
    }


def train(strategy: str, checkpointing: str) -> tuple[list[float], list[float], list[Any], Any]:
    config = configuration(strategy, checkpointing=checkpointing)
    engine: Engine = shard(build, SOURCE, config, ds_config(strategy, config), torch.device("cpu"))
    losses, norms = [], []
    mine = slice(
        dist.rank() * config.train.micro_batch_size,
        (dist.rank() + 1) * config.train.micro_batch_size,
    )
    for step in range(STEPS):
        crops, targets = step_data(step)
        apply_schedule(
            engine.param_groups, lr=LR, frozen=PROTOTYPES if step < FROZEN else frozenset()
        )
        _, scores = engine([crop[:, mine].flatten(0, 1) for crop in crops], None)
        loss = loss_of(scores, targets[mine])
        engine.backward(loss)
        norm = engine.step()
        assert norm is not None
        losses.append(float(dist.all_reduce(loss.detach().clone())) / dist.world_size())
        norms.append(float(norm))
    slices = [
        (s.name, s.shape, s.offset, s.values.clone(), s.momentum.clone()) for s in engine.slices()
    ]
    assert engine.loss_scale is None
    buffers = {name: b.clone() for name, b in engine.model.named_buffers()}
    return losses, norms, slices if engine.writes_slices else [], buffers


STRATEGIES = ["ddp", "fsdp", "zero0", "zero1", "zero2", "zero3"]


@pytest.mark.parametrize(
    ("strategy", "world_size"), [("ddp", 1), ("zero3", 1), *((name, 2) for name in STRATEGIES)]
)
def test_strategy_equals_plain_loop(
    distributed: Distributed, strategy: str, world_size: int
) -> None:
    checkpointing = "full" if world_size == 2 else "none"
    expected_losses, expected_norms, expected = oracle()
    ranks = distributed(train, world_size, strategy, checkpointing)
    losses, norms, _, buffers = ranks[0]
    # float32 sums in another order, amplified by six steps of a BatchNorm network
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert norms == pytest.approx(expected_norms, rel=1e-3)
    whole = {k: torch.full((v.numel(),), float("nan")) for k, v in expected.items()}
    for _, _, slices, _ in ranks:
        for name, shape, offset, values, _ in slices:
            assert shape == tuple(expected[name].shape)
            whole[name][offset : offset + values.numel()] = values
    for name, value in expected.items():
        actual = buffers[name] if name in buffers else whole[name].view(value.shape)
        torch.testing.assert_close(actual, value, rtol=1e-3, atol=1e-4, msg=f"{name} differs")
    rows = whole["prototypes.weight"].view(12, 16).norm(dim=1)
    torch.testing.assert_close(rows, torch.ones(12))


def frozen_state(strategy: str) -> list[tuple[float, float]]:
    """For each frozen step: how far the prototypes moved, and their momentum."""
    config = configuration(strategy)
    engine = shard(build, SOURCE, config, ds_config(strategy, config), torch.device("cpu"))
    start = {s.name: s.values.clone() for s in engine.slices()}
    result = []
    for step in range(FROZEN):
        crops, targets = step_data(step)
        rows = config.train.micro_batch_size
        mine = slice(dist.rank() * rows, (dist.rank() + 1) * rows)
        apply_schedule(engine.param_groups, lr=LR, frozen=PROTOTYPES)
        _, scores = engine([crop[:, mine].flatten(0, 1) for crop in crops], None)
        engine.backward(loss_of(scores, targets[mine]))
        engine.step()
        for s in engine.slices():
            if s.name in PROTOTYPES:
                moved = float((s.values - start[s.name]).abs().max())
                result.append((moved, float(s.momentum.abs().max())))
    return result


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_frozen_prototypes_keep_values_and_gather_no_momentum(
    distributed: Distributed, strategy: str
) -> None:
    for rank in distributed(frozen_state, 2, strategy):
        assert rank == [(0.0, 0.0)] * FROZEN


def accumulated(strategy: str, accumulation: int) -> list[Any]:
    """Two halves of a batch in turn, through a model without BatchNorm interaction (eval mode)."""
    config = configuration(strategy, accumulation)
    engine = shard(build, SOURCE, config, ds_config(strategy, config), torch.device("cpu"))
    engine.model.eval()  # running statistics: the micro-batches do not see each other
    rows = config.train.micro_batch_size
    norms = []
    for step in range(2):
        crops, targets = step_data(step)
        apply_schedule(engine.param_groups, lr=LR)
        for micro in range(accumulation):
            first = (micro * dist.world_size() + dist.rank()) * rows
            mine = slice(first, first + rows)
            _, scores = engine([crop[:, mine].flatten(0, 1) for crop in crops], None)
            engine.backward(loss_of(scores, targets[mine]))
            norm = engine.step()
            assert (norm is not None) == (micro == accumulation - 1)
        norms.append(float(norm))
    return [norms, [(s.name, s.offset, s.values.clone()) for s in engine.slices()]]


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_accumulation_equals_the_whole_batch(distributed: Distributed, strategy: str) -> None:
    whole = distributed(accumulated, 2, strategy, 1)
    halves = distributed(accumulated, 2, strategy, 2)
    for (norms, slices), (norms2, slices2) in zip(whole, halves, strict=True):
        assert norms2 == pytest.approx(norms, rel=1e-4)
        for (name, offset, values), (name2, offset2, values2) in zip(slices, slices2, strict=True):
            assert (name, offset) == (name2, offset2)
            torch.testing.assert_close(values2, values, rtol=1e-4, atol=1e-5, msg=name)
