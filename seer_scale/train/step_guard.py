"""A guard over steps that must not count: losses that are not finite, and spikes to be skipped.

The host learns the loss of a step only after the update has started. Therefore a loss that must not
count gets a gradient of NaN. The average over ranks carries the NaN to every rank, and the
optimizer, which knows the norms of all tensors on every rank, leaves weights and momentum as they
are. Once the host knows, the guard restores what the forward pass has changed: running statistics
and the objective's queue.
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
    """Verdict on a step; the same on every rank."""

    GOOD = "good"
    NONFINITE = "its loss or its gradient is not finite"  # the update was skipped
    SPIKE = "its loss jumped"  # the update was made
    SKIPPED_SPIKE = "its loss jumped, and its update was skipped"


class StepGuard:
    """Guards the steps of one rank.

    Args:
        model: model whose buffers are restored after a skipped step.
        objective: objective whose state, if any, is restored after a skipped step.
        mads: distance between a spike and the median loss; see `spike_threshold`.
        skip_spikes: whether updates of spikes are skipped. This costs an all-reduce of one number
            before the last backward pass of a step, and no wait.
        micro_batches: micro-batches per step.

    Attributes:
        threshold: loss above which the present step is a spike.
        nonfinite: consecutive non-finite steps up to now.
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
        self.nonfinite = 0

    @torch.no_grad()
    def begin(self, losses: Sequence[float]) -> None:
        """Prepares for a step; `losses` are the finite losses of the steps before, oldest first."""
        self.threshold = spike_threshold(losses, self._mads)
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)
        if hasattr(self._objective, "state_dict"):
            own = self._objective.state_dict()
            self._own = {key: value.detach().clone() for key, value in own.items()}

    def gate(self, loss: Tensor, so_far: Tensor | None) -> Tensor:
        """Returns `loss` with a gradient of NaN if the step must not count; the host does not wait.

        Args:
            loss: loss of this rank's micro-batch, [].
            so_far: at the last micro-batch of a step the sum of this rank's losses, []; else None.
        """
        factor = 1 + 0 * loss.detach()  # NaN where the loss is infinite or NaN
        if self._skip_spikes and so_far is not None:
            ranks = distributed.world_size()
            mean = distributed.all_reduce(so_far.clone()) / (ranks * self._micro_batches)
            factor = torch.where(mean > self.threshold, math.nan, factor)
        return loss * factor

    def judge(self, loss: float, grad_norm: float, *, overflow: bool) -> Verdict:
        """Judges a step, and restores what the forward passes of a skipped step have changed.

        Args:
            loss: mean loss over all ranks.
            grad_norm: norm of the gradient; not finite on any rank if the update was skipped.
            overflow: whether the loss scale of float16 has skipped the update. With a finite loss
                such a step is good.
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
