"""Steps that must not count: a loss that is not finite, and with `on_spike=skip` one that jumps.

The host learns a step's loss after the update is under way. So a loss that must not count gets a
gradient that is NaN, the average over ranks makes it everybody's, and the optimizer, which sees the
norms of all tensors on every rank, leaves weights and momentum as they are. What the forward pass
has moved (running statistics, a queue) is put back once the host knows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.objectives import Objective
from seer_scale.train.spikes import spike_threshold


class Verdict(Enum):
    """What a step was; the same on every rank."""

    GOOD = "good"
    NONFINITE = "its loss or its gradient is not finite"  # and its update was skipped
    SPIKE = "its loss jumped"  # and its update was made
    SKIPPED_SPIKE = "its loss jumped, and its update was skipped"


class StepGuard:
    """Watches over the steps of one rank.

    Args:
        model: whose buffers a step moves.
        objective: whose state it moves, if it has one.
        mads: distance from the usual loss that is a spike; see `spike_threshold`.
        skip_spikes: whether their updates are skipped. Costs an all-reduce of one number before
            the last backward pass of a step, and no wait.
        micro_batches: of a step.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        *,
        mads: float,
        skip_spikes: bool,
        micro_batches: int,
    ) -> None:
        self._buffers = list(model.buffers())
        self._before = [buffer.clone() for buffer in self._buffers]
        self._objective = objective
        self._own: dict[str, Tensor] = {}
        self._mads, self._skip_spikes = mads, skip_spikes
        self._micro_batches = micro_batches
        self.threshold = math.inf
        self.nonfinite = 0  # steps in a row

    @torch.no_grad()
    def begin(self, losses: Sequence[float]) -> None:
        """Call before a step, with the finite losses of those before it."""
        self.threshold = spike_threshold(losses, self._mads)
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)
        if hasattr(self._objective, "state_dict"):
            own = self._objective.state_dict()
            self._own = {key: value.detach().clone() for key, value in own.items()}

    def gate(self, loss: Tensor, so_far: Tensor | None) -> Tensor:
        """`loss`, with a gradient that is NaN if the step must not count; the host does not wait.

        Args:
            loss: of this rank's micro-batch.
            so_far: at the last micro-batch of a step the sum of all its losses, else None.
        """
        factor = 1 + 0 * loss.detach()  # NaN where the loss is infinite or NaN
        if self._skip_spikes and so_far is not None:
            ranks = distributed.world_size()
            mean = distributed.all_reduce(so_far.clone()) / (ranks * self._micro_batches)
            factor = torch.where(mean > self.threshold, math.nan, factor)
        return loss * factor

    def judge(self, loss: float, grad_norm: float, *, overflow: bool) -> Verdict:
        """Call once the step's means are known; puts back what a skipped step has moved.

        Args:
            loss: mean over all ranks.
            grad_norm: not finite if the update was skipped, on every rank.
            overflow: the loss scale has skipped it; with a finite loss that is an ordinary event.
        """
        skipped, spike = not math.isfinite(grad_norm), loss > self.threshold
        if not math.isfinite(loss) or (skipped and not spike and not overflow):
            verdict = Verdict.NONFINITE
        elif spike:
            verdict = Verdict.SKIPPED_SPIKE if skipped else Verdict.SPIKE
        else:
            verdict = Verdict.GOOD
        self.nonfinite = self.nonfinite + 1 if verdict is Verdict.NONFINITE else 0
        if verdict in (Verdict.NONFINITE, Verdict.SKIPPED_SPIKE):
            self._undo()
        return verdict

    @torch.no_grad()
    def _undo(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        if self._own and hasattr(self._objective, "load_state_dict"):
            self._objective.load_state_dict(self._own)
