"""Weighted k-nearest-neighbour classification of features (Wu et al., arXiv 1805.01978, 3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.inference_mode()
def knn_top1(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> float:
    """Share of queries whose class wins the vote of their k nearest bank features.

    Args:
        bank: features [N, C]; compared by cosine.
        bank_labels: classes [N], int64.
        queries: features [M, C].
        query_labels: classes [M], int64.
        k: voters per query; at most N count.
        temperature: a neighbour's vote weighs exp(cosine / temperature).
    """
    similarity = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T  # [M, N]
    cosine, nearest = similarity.topk(min(k, bank.shape[0]), dim=1)  # [M, k]
    classes = int(torch.cat([bank_labels, query_labels]).max()) + 1
    votes = torch.zeros(queries.shape[0], classes, dtype=cosine.dtype)
    votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())
    return float((votes.argmax(1) == query_labels).double().mean())
