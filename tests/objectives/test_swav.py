"""SwAV against slow loops, its queue against a list, and two ranks against one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from harness.pool import Distributed
from seer_scale.objectives import SwAV
from seer_scale.objectives.queue import EmbeddingQueue, reshard_queue
from tests.objectives.oracles import Toy, cosines, crop_major, slow_codes, slow_swav

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-13}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crops": 2},
        {"crops": 3, "assign_crops": (2,)},
        {"crops": 4, "assign_crops": (0, 1, 3), "temperature": 0.5, "epsilon": 0.3},
        {"crops": 8, "sinkhorn_iterations": 10, "epsilon": 0.03},
    ],
    ids=str,
)
def test_loss_and_gradients_equal_slow_loops(options: Any) -> None:
    crops = options.get("crops", 6)
    toy = Toy(crops * 3)
    embeddings, scores = toy.outputs()
    loss, _ = SwAV(**options)(embeddings, scores)
    slow = {key.removeprefix("sinkhorn_"): value for key, value in options.items()}
    expected = slow_swav(scores, **slow)
    torch.testing.assert_close(loss, expected, **EXACT)
    for gradient, slow_gradient in zip(toy.gradients(loss), toy.gradients(expected), strict=True):
        assert slow_gradient.abs().max() > 0
        torch.testing.assert_close(gradient, slow_gradient, **EXACT)


def test_codes_carry_no_gradient_but_every_crop_is_predicted() -> None:
    scores = cosines(12, 5).requires_grad_()
    loss, _ = SwAV(crops=3, assign_crops=(0,))(cosines(12, 4), scores)
    loss.backward()
    assert scores.grad[:4].abs().max() == 0
    assert (scores.grad[4:].abs().sum(dim=1) > 0).all()


def test_is_float32_under_autocast_and_for_low_precision_scores() -> None:
    embeddings, scores = (tensor.detach().float() for tensor in Toy(12).outputs())
    plain, _ = SwAV()(embeddings, scores)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast, _ = SwAV()(embeddings, scores)
    assert torch.equal(cast, plain)
    low, _ = SwAV()(embeddings, scores.bfloat16())
    rounded, _ = SwAV()(embeddings, scores.bfloat16().float())
    assert low.dtype == torch.float32
    assert torch.equal(low, rounded)


def loss_and_gradients(
    options: Any, rank: Any = 0, ranks: Any = 1, steps: Any = 1, batch: Any = 8
) -> Any:
    """Of the last of `steps` micro-batches, of which `rank` gets its share."""
    crops = 3
    toy = Toy(crops * batch)
    objective = SwAV(crops=crops, **options)
    for step in range(steps):
        inputs = cosines(crops * batch, 5, seed=10 + step)
        embeddings, scores = toy.outputs(crop_major(inputs, crops, rank, ranks))
        if objective.queue is not None:
            scores = torch.cat([scores, objective.queue @ toy.prototypes.T])
        loss, metrics = objective(embeddings, scores)
    gathered = [loss, *metrics.values(), *toy.gradients(loss)]
    return [tensor.detach().numpy() for tensor in gathered], objective.queue is not None


def loss_and_gradients_of_rank(options: Any, steps: Any) -> Any:
    world = torch.distributed.get_world_size()
    return loss_and_gradients(options, torch.distributed.get_rank(), world, steps)


@pytest.mark.parametrize(
    ("ranks", "options", "steps"),
    [(2, {}, 1), (4, {"epsilon": 0.03}, 1), (2, {"queue_length": 16}, 4)],
    ids=["2 ranks", "4 ranks", "2 ranks with a queue"],
)
def test_ranks_together_equal_one_process(
    distributed: Distributed, ranks: Any, options: Any, steps: Any
) -> None:
    whole, queued = loss_and_gradients(options, steps=steps)
    assert queued == ("queue_length" in options)
    parts = [part for part, _ in distributed(loss_and_gradients_of_rank, ranks, options, steps)]
    for tensors in zip(whole, *parts, strict=True):
        expected, *shares = [torch.from_numpy(tensor) for tensor in tensors]
        mean = torch.stack(shares).mean(dim=0)  # what data-parallel training does with gradients
        tolerance = EXACT if expected.dtype == torch.float64 else {"rtol": 1e-6, "atol": 0}
        torch.testing.assert_close(mean, expected, **tolerance)


def test_queue_is_a_list_whose_oldest_leave() -> None:
    crops, batch, length, dim = 3, 2, 5, 4
    objective = SwAV(crops=crops, assign_crops=(0, 2), queue_length=length)
    newest_first: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    prototypes = cosines(6, dim, seed=9)
    for step in range(6):
        lists = [rows[:length] for rows in newest_first.values()]
        full = len(lists[0]) == length
        assert (objective.queue is not None) == full
        embeddings = cosines(crops * batch, dim, seed=step)
        scores = embeddings @ prototypes.T
        queue_scores = None
        if full:
            expected = torch.stack([row for rows in lists for row in rows])
            assert objective.queue is not None
            assert torch.equal(objective.queue, expected)
            queue_scores = [torch.stack(rows) @ prototypes.T for rows in lists]
        extra = [] if objective.queue is None else [objective.queue @ prototypes.T]
        loss, _ = objective(embeddings, torch.cat([scores, *extra]))
        slow = slow_swav(scores, crops=crops, assign_crops=(0, 2), queue_scores=queue_scores)
        torch.testing.assert_close(loss, slow, **EXACT)
        for crop, rows in newest_first.items():
            rows[:0] = embeddings[crop * batch : (crop + 1) * batch].unbind()
    assert full


def test_queue_changes_the_loss() -> None:
    embeddings, scores = (tensor.detach() for tensor in Toy(18).outputs())
    objective = SwAV(queue_length=3)
    first, _ = objective(embeddings, scores)
    second, _ = objective(embeddings, torch.cat([scores, cosines(6, 6)]))
    assert first != second


def test_codes_of_a_crop_are_balanced_with_its_own_part_of_the_queue() -> None:
    crops, batch, length, prototypes = 3, 2, 2, 4
    objective = SwAV(crops=crops, queue_length=length)
    embeddings = cosines(crops * batch, 5)
    objective(embeddings, cosines(crops * batch, prototypes, seed=1))
    assert objective.queue is not None
    scores = cosines(crops * batch + 2 * length, prototypes, seed=2)
    loss, _ = objective(embeddings, scores)
    rows = scores.tolist()
    current = [rows[crop * batch : (crop + 1) * batch] for crop in range(crops)]
    queued = [rows[crops * batch :][crop * length : (crop + 1) * length] for crop in (0, 1)]
    log_p = torch.log_softmax(scores[: crops * batch] / 0.1, dim=1).view(crops, batch, -1)
    expected = []
    for crop in (0, 1):
        codes = slow_codes(current[crop] + queued[crop], 0.05, 3)
        expected += [
            -sum(codes[image][k] * float(log_p[other, image, k]) for k in range(prototypes))
            for other in range(crops)
            if other != crop
            for image in range(batch)
        ]
    assert float(loss) == pytest.approx(sum(expected) / len(expected), rel=1e-9)


def test_queue_keeps_no_graph() -> None:
    objective = SwAV(queue_length=2)
    objective(*Toy(12).outputs())
    assert objective.queue is not None
    assert not objective.queue.requires_grad


def test_queue_waits_for_its_start() -> None:
    objective = SwAV(crops=2, queue_length=2, queue_start_steps=3)
    offered = []
    for _ in range(4):
        offered.append(objective.queue is not None)
        objective(cosines(4, 3), cosines(4 if objective.queue is None else 8, 5))
    assert offered == [False, False, False, True]


@pytest.mark.parametrize("steps", [0, 1, 4], ids=["unused", "filling", "full"])
def test_queue_continues_from_its_state(steps: Any) -> None:
    def step(objective: Any, seed: Any) -> Any:
        embeddings = cosines(4, 3, seed=seed)
        extra = [] if objective.queue is None else [objective.queue]
        rows = torch.cat([embeddings, *extra])
        return objective(embeddings, rows @ cosines(5, 3, seed=99).T)[0]

    options: dict[str, Any] = {"crops": 2, "queue_length": 5, "queue_start_steps": 4}
    original, resumed = SwAV(**options), SwAV(**options)
    for seed in range(steps):
        step(original, seed)
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    resumed.load_state_dict(state)
    for seed in range(steps, 8):
        assert torch.equal(step(original, seed), step(resumed, seed))
    assert resumed.queue is not None


def test_a_longer_saved_queue_is_cut_to_its_newest() -> None:
    long, short = (SwAV(crops=2, queue_length=length) for length in (6, 4))
    for seed in range(3):
        long(cosines(4, 3, seed=seed), cosines(4, 5))
    short.load_state_dict(long.state_dict())
    assert short.queue is not None
    assert long.queue is not None
    assert torch.equal(short.queue, long.queue.unflatten(0, (2, 6))[:, :4].flatten(0, 1))


def test_without_a_queue_there_is_no_state() -> None:
    objective = SwAV()
    objective(*Toy(12).outputs())
    assert objective.queue is None
    assert objective.state_dict() == {}
    objective.load_state_dict({})


def test_metrics_of_a_spread_batch() -> None:
    # Six images on six orthogonal directions, each with a prototype of its own.
    embeddings = torch.eye(6).repeat(2, 1)
    loss, metrics = SwAV(crops=2)(embeddings, embeddings)
    assert metrics["loss_over_ln_k"] == pytest.approx(float(loss) / math.log(6))
    assert metrics["loss_over_ln_k"] < 0.01
    assert metrics["prototype_usage_entropy"] == pytest.approx(1)
    assert all(metric.dim() == 0 and not metric.requires_grad for metric in metrics.values())


def test_metrics_of_a_collapsed_batch() -> None:
    embeddings = torch.nn.functional.normalize(cosines(1, 256).float()).expand(24, -1)
    scores = torch.full((24, 3000), 0.7)
    loss, metrics = SwAV()(embeddings, scores)
    assert loss == pytest.approx(8.006, abs=5e-4)  # the published value to be stuck at
    assert metrics["loss_over_ln_k"] == pytest.approx(1, abs=1e-6)
    assert metrics["embedding_std"] < 1e-6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"crops": 1}, "crops is 1, but must be at least 2"),
        ({"temperature": 0}, "temperature is 0, but must be positive"),
        ({"temperature": math.inf}, "temperature is inf, but must be positive"),
        ({"epsilon": -0.05}, "epsilon is -0.05, but must be positive"),
        ({"epsilon": math.nan}, "epsilon is nan, but must be positive"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations is 0, but must be positive"),
        ({"assign_crops": ()}, r"assign_crops is \[\], but must hold different crops from 0 to 5"),
        ({"assign_crops": (0, 0)}, r"assign_crops is \[0, 0\], but must hold different crops"),
        ({"assign_crops": (0, -1)}, r"assign_crops is \[0, -1\], but must hold different crops"),
        ({"crops": 2, "assign_crops": (0, 2)}, r"crops is \[0, 2\].* from 0 to 1"),
        ({"queue_length": -1}, "queue_length is -1, but must be 0 or more"),
        ({"queue_start_steps": -1}, "queue_start_steps is -1, but must be 0 or more"),
    ],
    ids=str,
)
def test_refuses_numbers_out_of_range(options: Any, sentence: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        SwAV(**options)


def odd_queue() -> Any:
    try:
        SwAV(queue_length=5)
    except ValueError as error:
        return str(error)


def test_refuses_a_queue_that_does_not_divide_over_the_ranks(distributed: Distributed) -> None:
    for sentence in distributed(odd_queue, 2):
        assert sentence.startswith("queue_length is 5, but must be")
        assert sentence.endswith("a multiple of the number of ranks, 2")


@pytest.mark.parametrize("shape", [(13, 4), (0, 4), (12,)])
def test_refuses_embeddings_that_are_not_crops(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"embeddings have shape .* with 6 crops"):
        SwAV()(torch.zeros(shape), torch.zeros(12, 5))


@pytest.mark.parametrize("shape", [(11, 5), (13, 5), (12,)])
def test_refuses_scores_that_do_not_match_the_embeddings(shape: Any) -> None:
    with pytest.raises(ValueError, match="must have 12 rows for the crops and 0 for the queue"):
        SwAV()(torch.zeros(12, 4), torch.zeros(shape))


def test_refuses_scores_without_those_of_a_full_queue() -> None:
    objective = SwAV(crops=2, queue_length=2)
    objective(cosines(4, 3), cosines(4, 5))
    with pytest.raises(ValueError, match="must have 4 rows for the crops and 4 for the queue"):
        objective(cosines(4, 3), cosines(4, 5))


def queues(world_size: int, batch: int, pushes: int, length: int) -> list[EmbeddingQueue]:
    """Every rank's queue after `pushes` global batches; each embedding is its sample's number."""
    ranks = [EmbeddingQueue(length // world_size, 0) for _ in range(world_size)]
    for push in range(pushes):
        first = push * batch * world_size
        for rank, queue in enumerate(ranks):
            numbers = torch.arange(first + rank * batch, first + (rank + 1) * batch)
            queue.push(torch.stack([numbers, -numbers])[:, :, None].float())
    return ranks


def numbers_of(all_queues: list[EmbeddingQueue]) -> list[int]:
    """Samples in all queues; those of both assign crops go together."""
    kept = [queue.state_dict()["queue"][:, :, 0] for queue in all_queues]
    assert all(torch.equal(rows[0], -rows[1]) for rows in kept)
    assert len({rows.shape for rows in kept}) == 1
    return sorted(int(number) for rows in kept for number in rows[0])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 2), (4, 1), (1, 4)])
@pytest.mark.parametrize("pushes", [1, 2, 5])
def test_queues_of_another_number_of_ranks_hold_the_same_samples(
    before: int, after: int, pushes: int
) -> None:
    batch, length = 8, 24
    states = [queue.state_dict() for queue in queues(before, batch // before, pushes, length)]
    expected = queues(after, batch // after, pushes, length)
    actual = [EmbeddingQueue(length // after, 0) for _ in range(after)]
    for rank, queue in enumerate(actual):
        queue.load_state_dict(reshard_queue(states, rank, after))
    assert numbers_of(actual) == numbers_of(expected)
    for more in (0, 1):  # and they lose the same ones
        for rank in range(after):
            first = (pushes + more) * batch + rank * batch // after
            numbers = torch.arange(first, first + batch // after).float()
            for queue in (actual[rank], expected[rank]):
                queue.push(torch.stack([numbers, -numbers])[:, :, None])
        assert numbers_of(actual) == numbers_of(expected)
