"""Sinkhorn-Knopp: scores to codes that use all prototypes equally (SwAV, section 3.1).

Codes are computed on the samples of all ranks together, in float32, and stay finite for every
finite input.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from seer_scale.distributed import all_reduce

SMALLEST_EPSILON = torch.finfo(torch.float32).tiny  # below it a division would be by zero


@torch.no_grad()
def sinkhorn_knopp(
    scores: Tensor, *, epsilon: float, iterations: int, group: ProcessGroup | None = None
) -> Tensor:
    """Codes [B, K] of scores [B, K]: each sample's codes sum to 1, prototypes are used equally.

    An iteration scales every prototype's codes to the same sum over the samples of all ranks,
    then every sample's to the same sum. Ranks may hold different numbers of samples, but at
    least one each; only vectors of K numbers are exchanged, iterations + 1 times.

    Args:
        scores: one row per sample of this rank; computed in float32, in float64 if given so.
            [A, B, K] is A matrices, each balanced by itself; they share the exchanges.
        epsilon: strength of the entropy term; the smaller, the sharper the codes.
        iterations: SwAV takes 3, SEER 10.
        group: ranks whose samples are balanced together; all unless given.

    Raises:
        ValueError: if the scores are not matrices, or a number is out of range.
    """
    if scores.dim() not in (2, 3) or scores.numel() == 0:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)}, but must be [B, K] or [A, B, K]"
        )
    if not epsilon >= SMALLEST_EPSILON:
        raise ValueError(f"epsilon is {epsilon}, but must be positive as a float32")
    if iterations < 1:
        raise ValueError(f"iterations is {iterations}, but must be at least 1")
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))

    # The usual factors 1 / total, 1 / K and 1 / B are left out: each is cancelled by the next
    # normalisation. So nobody needs to know how many samples there are.
    #
    # The first iteration is done on logarithms, because exp(score / epsilon) overflows, and below
    # a single global maximum whole prototypes or samples can underflow to 0 / 0. Relative to its
    # own maximum over all ranks, every prototype's sum is at least 1, and softmax does the same
    # for the samples. From then on no sum is below 1 / max(B, K), so plain numbers do.
    best = all_reduce(wide.amax(dim=-2, keepdim=True), "max", group)  # [..., 1, K]
    logits = (wide - best) / epsilon  # [..., B, K], none positive
    logits.clamp_(min=torch.finfo(logits.dtype).min)  # a sample of nothing but -inf has no softmax
    sums = all_reduce(logits.exp().sum(dim=-2, keepdim=True), "sum", group)  # [..., 1, K]
    codes = torch.softmax(logits - sums.log(), dim=-1)
    for _ in range(iterations - 1):
        codes /= all_reduce(codes.sum(dim=-2, keepdim=True), "sum", group)
        codes /= codes.sum(dim=-1, keepdim=True)
    return codes
