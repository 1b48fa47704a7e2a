"""Low precision under every strategy: float32 state, and a loss scale that all ranks agree on."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

from harness.parity import (
    CASES,
    CROPS,
    LR,
    Result,
    build_engine,
    configuration,
    my_crops,
    plain_loop,
    whole_tensors,
)
from harness.pool import Distributed
from seer_scale import distributed as dist
from seer_scale.errors import UserError
from seer_scale.objectives.swav import SwAV
from seer_scale.optim.loss_scale import SMALLEST, LossScale
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.parallel.compatibility import PRECISIONS

DTYPES = {"bf16": torch.bfloat16, "amp-o1": torch.float16}
STEPS = 6
# Rounding of 8 (bf16) or 11 bits (float16) in every convolution, in another order on every rank;
# codes multiply a difference in scores by 1 / epsilon = 20.
TOLERANCE = {"bf16": 5e-2, "amp-o1": 1e-2}
SMALL_SCALE = 2.0**4  # no gradient of this network overflows float16 with it


@cache
def expected(precision: str) -> Result:
    return plain_loop(STEPS, DTYPES[precision])


def low_precision(name: str, precision: str) -> dict[str, Any]:
    case, device = CASES[name], torch.device("cpu")
    config = configuration(case, train={"steps": STEPS, "precision": precision})
    engine = build_engine(case, config, device)
    if engine.loss_scale:
        engine.loss_scale.value = SMALL_SCALE
    seen: set[torch.dtype] = set()
    for module in engine.model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(
                lambda _, __, output: seen.update(tensor.dtype for tensor in tree_leaves(output))
            )
    losses, scores = train_steps(engine, STEPS)
    return {
        "losses": losses,
        "scores": scores,
        "layers": seen,
        "state": {part.values.dtype for part in engine.slices()}
        | {part.momentum.dtype for part in engine.slices()},
        "buffers": {b.dtype for b in engine.model.buffers() if b.is_floating_point()},
    }


def train_steps(engine: Any, steps: int) -> tuple[list[float], torch.dtype]:
    objective = SwAV(crops=sum(CROPS))
    losses = []
    for step in range(steps):
        frozen = frozenset({"prototypes.weight"}) if step < 5 else frozenset()
        apply_schedule(engine.param_groups, lr=LR, frozen=frozen)
        embeddings, scores = engine(my_crops(step, torch.device("cpu")), None)
        loss, _ = objective(embeddings, scores)
        engine.backward(loss)
        engine.step()
        losses.append(float(dist.all_reduce(loss.detach().clone())) / dist.world_size())
    return losses, scores.dtype


def assert_works(distributed: Distributed, name: str, precision: str) -> None:
    for rank in distributed(low_precision, CASES[name].world_size, name, precision):
        assert rank["layers"] == {DTYPES[precision]}
        assert rank["scores"] == torch.float32
        assert rank["state"] == rank["buffers"] == {torch.float32}
        plain = expected(precision).losses
        assert rank["losses"] == pytest.approx(plain, rel=TOLERANCE[precision])


@pytest.mark.parametrize(("name", "precision"), [("fsdp", "amp-o1"), ("zero3", "bf16")])
def test_low_precision_trains_on_float32_state(
    distributed: Distributed, name: str, precision: str
) -> None:
    assert_works(distributed, name, precision)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_every_pair_of_the_table(distributed: Distributed, name: str, precision: str) -> None:
    assert precision in PRECISIONS[CASES[name].strategy]
    if name == "zero3+nvme":
        pytest.skip("minutes of small files; amp-o1 is refused there (test_compatibility.py)")
    assert_works(distributed, name, precision)


def overflow(name: str) -> list[Any]:
    """One step at a scale that overflows, one at a small scale."""
    case = CASES[name]
    config = configuration(case, train={"precision": "amp-o1"})
    engine = build_engine(case, config, torch.device("cpu"))
    assert engine.loss_scale is not None
    before = whole_tensors(engine)
    momenta = {part.name: part.momentum.clone() for part in engine.slices()}
    result: list[Any] = []
    for scale in (2.0**40, SMALL_SCALE):
        engine.loss_scale.value = scale
        # One rank alone overflows at first: the others have to skip the step with it.
        objective = SwAV(crops=sum(CROPS))
        apply_schedule(engine.param_groups, lr=LR)
        loss, _ = objective(*engine(my_crops(0, torch.device("cpu")), None))
        engine.backward(loss if dist.rank() == 0 or scale < 1e6 else loss * 2.0**-40)
        norm = engine.step()
        assert norm is not None
        after = whole_tensors(engine)
        same = [name for name in before if torch.equal(after[name], before[name])]
        same_momenta = all(torch.equal(p.momentum, momenta[p.name]) for p in engine.slices())
        result.append(
            (engine.loss_scale.overflowed, engine.loss_scale.value, float(norm), same, same_momenta)
        )
    return [result, list(before)]


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3", "zero2+cpu-offload"])
def test_overflow_skips_the_step_on_all_ranks_alike(distributed: Distributed, name: str) -> None:
    norms = []
    for (skipped, taken), names in distributed(overflow, 2, name):
        parameters = {n for n in names if "running_" not in n and "num_batches" not in n}
        overflowed, scale, norm, same, same_momenta = skipped
        assert (overflowed, scale, norm) == (True, 2.0**39, float("inf"))
        assert parameters <= set(same)  # BatchNorm has seen the batch, weights have not moved
        assert same_momenta
        overflowed, scale, norm, same, same_momenta = taken
        assert (overflowed, scale) == (False, SMALL_SCALE)
        assert not parameters & set(same)
        assert not same_momenta
        norms.append(norm)
    assert norms == pytest.approx([plain_loop(1).norms[0]] * 2, rel=2e-2)  # without the scale


def test_loss_scale_halves_doubles_and_gives_up() -> None:
    scale = LossScale(value=8.0, interval=3)
    scale.update(overflow=True)
    assert (scale.value, scale.stepped_with, scale.overflowed) == (4.0, 8.0, True)
    for _ in range(3):
        scale.update(overflow=False)
    assert (scale.value, scale.stepped_with, scale.overflowed) == (8.0, 4.0, False)
    # An overflow begins the count anew: the two good steps before it do not count.
    for overflow in (False, False, True, False, False):
        scale.update(overflow)
    assert (scale.value, scale.good_steps) == (4.0, 2)
    scale.update(overflow=False)
    assert scale.value == 8.0
    other = LossScale()
    other.load(scale.state())
    assert (other.value, other.good_steps) == (8.0, 0)
    scale.value = SMALLEST
    with pytest.raises(UserError, match="not finite even at a loss scale"):
        scale.update(overflow=True)
