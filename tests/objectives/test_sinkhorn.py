"""Codes against slow float64 loops, on one process and spread over several."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from harness.pool import Distributed
from seer_scale.objectives import sinkhorn_knopp
from tests.objectives.oracles import cosines, slow_codes


def slow_log_codes(scores: Any, epsilon: Any, iterations: Any) -> Any:
    """The same on logarithms, for scores whose exponentials no float64 holds."""
    logits = scores.double() / epsilon
    for _ in range(iterations):
        logits = logits - logits.logsumexp(dim=0, keepdim=True)
        logits = logits - logits.logsumexp(dim=1, keepdim=True)
    return logits.exp()


@pytest.mark.parametrize(("batch", "prototypes"), [(1, 5), (4, 2), (7, 11), (12, 3)])
@pytest.mark.parametrize("epsilon", [0.03, 0.05, 1.0])
@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_equals_slow_loops(batch: Any, prototypes: Any, epsilon: Any, iterations: Any) -> None:
    scores = cosines(batch, prototypes)
    expected = torch.tensor(slow_codes(scores.tolist(), epsilon, iterations), dtype=torch.float64)
    exact = sinkhorn_knopp(scores, epsilon=epsilon, iterations=iterations)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, expected, rtol=1e-10, atol=1e-14)
    # Rounding cosines to float32 shifts score / epsilon by up to 6e-8 / 0.03 = 2e-6.
    single = sinkhorn_knopp(scores.float(), epsilon=epsilon, iterations=iterations)
    torch.testing.assert_close(single, expected.float(), rtol=5e-5, atol=1e-7)


def test_samples_sum_to_one_and_prototypes_become_equal() -> None:
    codes = sinkhorn_knopp(cosines(24, 6), epsilon=0.5, iterations=200)
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(24, dtype=torch.float64))
    torch.testing.assert_close(codes.sum(dim=0), torch.full((6,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_scores_are_computed_in_float32(dtype: Any) -> None:
    scores = cosines(8, 16).to(dtype)
    codes = sinkhorn_knopp(scores, epsilon=0.03, iterations=10)
    assert codes.dtype == torch.float32
    assert torch.equal(codes, sinkhorn_knopp(scores.float(), epsilon=0.03, iterations=10))


def test_autocast_does_not_reach_it() -> None:
    scores = cosines(8, 16).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn_knopp(scores, epsilon=0.03, iterations=3)
    assert torch.equal(codes, sinkhorn_knopp(scores, epsilon=0.03, iterations=3))


@pytest.mark.parametrize("size", [10.0, 1e4])
def test_scores_beyond_the_exponential_are_still_exact(size: Any) -> None:
    scores = cosines(9, 14) * size
    scores[:, 3] -= 2 * size  # a prototype far below the rest
    scores[5] -= 3 * size  # and a sample
    codes = sinkhorn_knopp(scores, epsilon=0.03, iterations=4)
    torch.testing.assert_close(codes, slow_log_codes(scores, 0.03, 4), rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.03, 1e-4, 1e-30])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e4, 1e38])
def test_codes_are_finite_and_normalised_for_all_finite_scores(size: Any, epsilon: Any) -> None:
    scores = cosines(9, 14).float() * size
    scores[:, 3] = -2 * size
    scores[5] = -3 * size  # at the largest sizes infinitely far below every other sample
    codes = sinkhorn_knopp(scores, epsilon=epsilon, iterations=10)
    assert torch.isfinite(codes).all()
    torch.testing.assert_close(codes.sum(dim=1), torch.ones(9))


def test_neither_gradient_nor_input_is_touched() -> None:
    scores = cosines(4, 6).requires_grad_()
    before = scores.detach().clone()
    assert not sinkhorn_knopp(scores, epsilon=0.05, iterations=3).requires_grad
    assert torch.equal(scores, before)


def codes_of_part(bounds: Any, batch: Any, prototypes: Any, size: Any) -> Any:
    start, end = bounds[torch.distributed.get_rank()]
    scores = cosines(batch, prototypes)[start:end] * size
    return sinkhorn_knopp(scores, epsilon=0.05, iterations=3).numpy()


def codes_of_two(together: Any) -> Any:
    """Two crops' codes of this rank's samples, and the collectives that they took."""
    rank, calls = torch.distributed.get_rank(), []
    crops = [cosines(8, 10)[4 * rank : 4 * rank + 4] * size for size in (1.0, 0.3)]
    reduce = torch.distributed.all_reduce

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return reduce(*args, **kwargs)

    torch.distributed.all_reduce = counting
    try:
        if together:
            found = sinkhorn_knopp(torch.stack(crops), epsilon=0.05, iterations=3)
        else:
            found = torch.stack([sinkhorn_knopp(c, epsilon=0.05, iterations=3) for c in crops])
    finally:
        torch.distributed.all_reduce = reduce
    return found.numpy(), len(calls)


def test_several_matrices_are_balanced_each_by_itself_and_share_the_exchanges(
    distributed: Distributed,
) -> None:
    one_by_one, together = (distributed(codes_of_two, 2, choice) for choice in (False, True))
    for (expected, calls), (found, fewer) in zip(one_by_one, together, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)
        assert (calls, fewer) == (8, 4)


@pytest.mark.parametrize("size", [1.0, 1e4])
@pytest.mark.parametrize(
    "bounds",
    [[(0, 4), (4, 8)], [(0, 3), (3, 8)], [(0, 1), (1, 4), (4, 6), (6, 8)]],
    ids=["halves", "3+5", "1+3+2+2"],
)
def test_ranks_together_equal_one_process(distributed: Distributed, bounds: Any, size: Any) -> None:
    whole = sinkhorn_knopp(cosines(8, 10) * size, epsilon=0.05, iterations=3)
    parts = distributed(codes_of_part, len(bounds), bounds, 8, 10, size)
    together = torch.cat([torch.from_numpy(part) for part in parts])
    torch.testing.assert_close(together, whole, rtol=1e-10, atol=1e-14)


def codes_within_groups() -> Any:
    rank = torch.distributed.get_rank()
    groups: list[Any] = [torch.distributed.new_group([0, 1]), torch.distributed.new_group([2, 3])]
    scores = cosines(8, 10)[2 * rank : 2 * rank + 2]
    scores += 64 * (rank // 2)  # beside the second group's maximum, the first underflows
    return sinkhorn_knopp(scores, epsilon=0.05, iterations=3, group=groups[rank // 2]).numpy()


def test_only_the_ranks_of_a_group_are_balanced_together(distributed: Distributed) -> None:
    parts = [torch.from_numpy(part) for part in distributed(codes_within_groups, 4)]
    for first in (0, 2):
        alone = sinkhorn_knopp(
            cosines(8, 10)[2 * first : 2 * first + 4], epsilon=0.05, iterations=3
        )
        pair = torch.cat(parts[first : first + 2])
        torch.testing.assert_close(pair, alone, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("epsilon", [0, -0.05, math.nan, 1e-50])
def test_refuses_an_epsilon_that_is_not_positive(epsilon: Any) -> None:
    with pytest.raises(ValueError, match=r"epsilon is .*, but must be positive"):
        sinkhorn_knopp(cosines(4, 6), epsilon=epsilon, iterations=3)


def test_refuses_no_iterations() -> None:
    with pytest.raises(ValueError, match="iterations is 0, but must be at least 1"):
        sinkhorn_knopp(cosines(4, 6), epsilon=0.05, iterations=0)


@pytest.mark.parametrize("shape", [(6,), (2, 3, 4, 5), (0, 4)])
def test_refuses_scores_that_are_no_matrices(shape: Any) -> None:
    with pytest.raises(ValueError, match=r"scores have shape .*, but must be \[B, K\]"):
        sinkhorn_knopp(torch.zeros(shape), epsilon=0.05, iterations=3)
