"""Totals of a step over micro-batches and ranks, by one all-reduce and one wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from seer_scale import distributed
from seer_scale.train.stopping import Stop


class Totals(NamedTuple):
    """Totals of a step, the same on every rank.

    Attributes:
        means: means of the loss and of the objective's metrics over ranks and micro-batches.
        grad_norm: norm of the step's gradient.
        bad: number of images that could not be used.
        work: seconds that each rank worked in the step before, in rank order.
        stop: strongest wish to stop of any rank.
        refresh: whether any rank wants the manifest of shards read.
    """

    means: dict[str, float]
    grad_norm: float
    bad: int
    work: list[float]
    stop: Stop
    refresh: bool


class StepTotals:
    """Adds up the metrics of a step's micro-batches; every rank adds metrics of the same names.

    Args:
        device: device of this rank, where sums are kept so that the host does not wait.
        micro_batches: micro-batches per step.
    """

    def __init__(self, device: torch.device, micro_batches: int) -> None:
        self._device, self._micro_batches = device, micro_batches
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """Adds the metrics of one micro-batch, each a number or a tensor of shape []."""
        for name, value in metrics.items():
            if not isinstance(value, Tensor):
                value = torch.full((), value, device=self._device)
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def __getitem__(self, name: str) -> Tensor:
        """Returns the sum of a metric so far, [] float32."""
        return self._sums[name]

    def over_ranks(
        self, grad_norm: Tensor, *, bad: int, worked: float, stop: Stop, refresh: bool
    ) -> Totals:
        """Adds up over all ranks; every rank calls this method at the end of a step.

        The call is the step's only wait for the device, apart from that of a float16 loss scale.

        Args:
            grad_norm: norm of the step's gradient, [], the same on every rank.
            bad: number of this rank's images that could not be used.
            worked: seconds that this rank worked in the step before.
            stop: this rank's wish to stop.
            refresh: whether this rank wants the manifest of shards read.
        """
        ranks = distributed.world_size()
        work = [0.0] * ranks
        work[distributed.rank()] = worked
        own = [bad, stop is Stop.DONE, stop is Stop.REQUEUE, refresh, *work]
        wishes = torch.tensor(own, dtype=torch.float32).to(self._device, non_blocking=True)
        stacked = distributed.all_reduce(torch.cat([torch.stack([*self._sums.values()]), wishes]))
        norm = grad_norm.to(self._device, non_blocking=True)[None]
        values = torch.cat([stacked, norm]).tolist()
        all_bad, done, requeue, due, *work, found_norm = values[len(self._sums) :]
        scale = 1 / (ranks * self._micro_batches)
        return Totals(
            {name: total * scale for name, total in zip(self._sums, values, strict=False)},
            found_norm,
            int(all_bad),
            work,
            Stop.REQUEUE if requeue else Stop.DONE if done else Stop.NO,
            bool(due),
        )
