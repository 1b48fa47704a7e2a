"""Objectives as slow loops in float64, and small inputs for them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def cosines(batch: Any, prototypes: Any, seed: Any = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, prototypes, generator=generator, dtype=torch.float64) * 2 - 1


def crop_major(tensor: Tensor, crops: int, rank: int, ranks: int) -> Tensor:
    """The rows [crops * B / ranks, .] of one rank's images out of [crops * B, .]."""
    rows: Tensor = tensor.unflatten(0, (crops, ranks, -1))[:, rank].flatten(0, 1)
    return rows


class Toy:
    """Inputs [N, 5], a projection to unit embeddings [N, D] and prototypes [K, D], all float64."""

    def __init__(self, rows: int, dim: int = 4, prototypes: int = 6) -> None:
        self.inputs = cosines(rows, 5, seed=1)
        self.projection = cosines(5, dim, seed=2).requires_grad_()
        self.prototypes = cosines(prototypes, dim, seed=3).requires_grad_()

    def outputs(self, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Embeddings and scores, with a graph."""
        inputs = self.inputs if inputs is None else inputs
        embeddings = F.normalize(inputs @ self.projection, dim=1)
        return embeddings, embeddings @ self.prototypes.T

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Of the projection and of the prototypes; the graph stays for another loss."""
        leaves = [self.projection, self.prototypes]
        return list(torch.autograd.grad(loss, leaves, retain_graph=True))


def slow_codes(scores: Any, epsilon: Any, iterations: Any) -> Any:
    """SwAV's algorithm with all its factors, number by number, in float64."""
    samples, prototypes = range(len(scores)), range(len(scores[0]))
    q = [[math.exp(scores[b][k] / epsilon) for b in samples] for k in prototypes]  # [K][B]
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(iterations):
        for k in prototypes:
            row = sum(q[k])
            q[k] = [value / row / len(prototypes) for value in q[k]]
        for b in samples:
            column = sum(q[k][b] for k in prototypes)
            for k in prototypes:
                q[k][b] /= column * len(samples)
    return [[q[k][b] / sum(q[j][b] for j in prototypes) for k in prototypes] for b in samples]


def slow_swav(
    scores: Tensor,
    *,
    crops: int = 6,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
    assign_crops: tuple[int, ...] = (0, 1),
    queue_scores: list[Tensor] | None = None,
) -> Tensor:
    """Swapped prediction, one product at a time."""
    batch = len(scores) // crops
    losses = []
    for index, assigned in enumerate(assign_crops):
        queued = [] if queue_scores is None else queue_scores[index].tolist()
        current = scores[assigned * batch : (assigned + 1) * batch].tolist()
        codes = slow_codes(current + queued, epsilon, iterations)
        for predicted in range(crops):
            if predicted == assigned:
                continue
            for b in range(batch):
                logits = scores[predicted * batch + b] / temperature
                normaliser = logits.exp().sum().log()
                losses += [
                    -code * (logit - normaliser)
                    for code, logit in zip(codes[b], logits, strict=True)
                ]
    return torch.stack(losses).sum() / (len(assign_crops) * (crops - 1) * batch)


def slow_simclr(embeddings: Tensor, *, crops: int, temperature: float) -> Tensor:
    """NT-Xent over all pairs of crops of an image, pair by pair."""
    rows = len(embeddings)
    batch = rows // crops
    losses = []
    for i in range(rows):
        weights = [
            (embeddings[i] @ embeddings[j] / temperature).exp() for j in range(rows) if j != i
        ]
        for j in range(rows):
            if j != i and j % batch == i % batch:
                weight = (embeddings[i] @ embeddings[j] / temperature).exp()
                losses.append(-(weight / torch.stack(weights).sum()).log())
    return torch.stack(losses).mean()
