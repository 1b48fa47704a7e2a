"""What a step adds up to, over its micro-batches and over the ranks: one all-reduce, one wait."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from seer_scale import distributed
from seer_scale.train.stopping import Stop


class Totals(NamedTuple):
    """The same on every rank.

    Attributes:
        means: of the loss and the objective's metrics, over ranks and micro-batches.
        grad_norm: of the step.
        bad: images that could not be used.
        work: seconds that every rank worked, in the step before.
        stop: the most that any rank was asked for.
        refresh: whether any rank wants the manifest read.
    """

    means: dict[str, float]
    grad_norm: float
    bad: int
    work: list[float]
    stop: Stop
    refresh: bool


class StepTotals:
    """Takes in the metrics of a step's micro-batches; every rank has the same ones.

    Args:
        device: of this rank, where they add up without a wait.
        micro_batches: of a step.
    """

    def __init__(self, device: torch.device, micro_batches: int) -> None:
        self._device, self._micro_batches = device, micro_batches
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: Mapping[str, Tensor | float]) -> None:
        """One micro-batch's, each a number or [] tensor."""
        for name, value in metrics.items():
            if not isinstance(value, Tensor):
                value = torch.full((), value, device=self._device)
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()

    def __getitem__(self, name: str) -> Tensor:
        """The sum so far, [] float32."""
        return self._sums[name]

    def over_ranks(
        self, grad_norm: Tensor, *, bad: int, worked: float, stop: Stop, refresh: bool
    ) -> Totals:
        """Every rank calls it at the end of a step; the step's one wait for the device.

        Args:
            grad_norm: [], the same on every rank.
            bad: this rank's images that could not be used.
            worked: seconds.
            stop: what this rank was asked for.
            refresh: whether it wants the manifest read.
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
