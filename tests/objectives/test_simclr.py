"""SimCLR against slow loops, and two ranks against one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from harness.pool import Distributed
from seer_scale.objectives import SimCLR
from tests.objectives.oracles import Toy, cosines, crop_major, slow_simclr

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}


@pytest.mark.parametrize(("crops", "temperature"), [(2, 0.1), (2, 1.0), (3, 0.1), (6, 0.5)])
def test_loss_and_gradients_equal_slow_loops(crops: Any, temperature: Any) -> None:
    toy = Toy(crops * 4)
    embeddings, scores = toy.outputs()
    loss, _ = SimCLR(crops=crops, temperature=temperature)(embeddings, scores)
    expected = slow_simclr(embeddings, crops=crops, temperature=temperature)
    torch.testing.assert_close(loss, expected, **EXACT)
    (gradient,) = torch.autograd.grad(loss, toy.projection, retain_graph=True)
    (slow_gradient,) = torch.autograd.grad(expected, toy.projection)
    torch.testing.assert_close(gradient, slow_gradient, **EXACT)


def loss_and_gradients(rank: Any, ranks: Any, crops: Any = 3, batch: Any = 8) -> Any:
    toy = Toy(crops * batch)
    objective = SimCLR(crops=crops)
    loss, metrics = objective(*toy.outputs(crop_major(toy.inputs, crops, rank, ranks)))
    gathered = [loss, *metrics.values(), *toy.gradients(loss)]
    return [tensor.detach().numpy() for tensor in gathered]


def loss_and_gradients_of_rank() -> Any:
    return loss_and_gradients(torch.distributed.get_rank(), torch.distributed.get_world_size())


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_equal_one_process(distributed: Distributed, ranks: Any) -> None:
    parts = distributed(loss_and_gradients_of_rank, ranks)
    for tensors in zip(loss_and_gradients(0, 1), *parts, strict=True):
        expected, *shares = [torch.from_numpy(tensor) for tensor in tensors]
        mean = torch.stack(shares).mean(dim=0)  # what data-parallel training does with gradients
        tolerance = EXACT if expected.dtype == torch.float64 else {"rtol": 1e-6, "atol": 0}
        torch.testing.assert_close(mean, expected, **tolerance)


def loss_within_groups() -> Any:
    rank = torch.distributed.get_rank()
    groups: list[Any] = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    toy = Toy(16)
    inputs = crop_major(toy.inputs, 2, rank, 4)
    loss, _ = SimCLR(crops=2, group=groups[rank // 2])(*toy.outputs(inputs))
    return loss.item()


def test_only_the_ranks_of_a_group_are_contrasted(distributed: Distributed) -> None:
    losses = distributed(loss_within_groups, 4)
    for group in (0, 1):
        toy = Toy(16)
        loss, _ = SimCLR(crops=2)(*toy.outputs(crop_major(toy.inputs, 2, group, 2)))
        assert sum(losses[2 * group : 2 * group + 2]) / 2 == pytest.approx(loss.item(), rel=1e-10)


def test_prototypes_have_no_influence_but_a_gradient() -> None:
    toy = Toy(12)
    embeddings, scores = toy.outputs()
    loss, _ = SimCLR()(embeddings, scores)
    other, _ = SimCLR()(embeddings, scores + 3)
    assert loss == other
    _, gradient = toy.gradients(loss)
    assert torch.equal(gradient, torch.zeros_like(toy.prototypes))


def test_is_float32_under_autocast() -> None:
    embeddings, scores = (tensor.detach().float() for tensor in Toy(12).outputs())
    plain, _ = SimCLR()(embeddings, scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = SimCLR()(embeddings, scores)
    assert torch.equal(cast, plain)


def test_a_collapsed_batch_has_the_loss_of_guessing() -> None:
    embeddings = F.normalize(cosines(1, 16).float()).expand(12, -1)
    loss, metrics = SimCLR(crops=3)(embeddings, cosines(12, 5).float())
    assert loss == pytest.approx(math.log(11))
    assert metrics["embedding_std"] < 1e-6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"crops": 1}, "crops is 1, but must be at least 2"),
        ({"temperature": 0}, "temperature is 0, but must be positive"),
        ({"temperature": math.nan}, "temperature is nan, but must be positive"),
    ],
    ids=str,
)
def test_refuses_numbers_out_of_range(options: Any, sentence: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        SimCLR(**options)


def test_refuses_embeddings_that_are_not_crops() -> None:
    with pytest.raises(ValueError, match=r"embeddings have shape .* with 6 crops"):
        SimCLR()(torch.zeros(13, 4), torch.zeros(13, 5))
