"""The optimizer step inside the backward pass: a tensor steps when its gradient is complete.

LARC needs norms of single tensors only, so the result is the same as that of a step after the
backward pass. A gradient is freed at once, so that memory for all gradients is never taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from seer_scale.optim.slice_sgd import SliceSGD


class FusedBackward:
    """Steps units of parameters as soon as their gradients are complete.

    Args:
        optimizer: an optimizer without a loss scale, which could decide only after all gradients.
        units: parameters that step together, with one reduction of their norms. The gradients of a
            unit have to become complete at the same place on every rank.
        learn: whether a gradient arrives in several parts, the same number in every step. FSDP
            reduces a unit as often as the unit was called. The parts are counted in the first step,
            which is taken at the end of its backward pass. Without `learn` a gradient is complete
            when it first appears (autograd's own rule).

    Raises:
        RuntimeError: if a gradient arrives after its tensor has stepped, or not at all.
    """

    def __init__(
        self, optimizer: SliceSGD, units: Sequence[Sequence[Tensor]], *, learn: bool
    ) -> None:
        self._optimizer = optimizer
        self._units = [tuple(unit) for unit in units]
        self._parts: list[int] | None = None if learn else [len(unit) for unit in units]
        self._arrived = [0] * len(units)
        for index, unit in enumerate(self._units):
            for parameter in unit:
                parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                    partial(self._arrive, index)
                )

    def _arrive(self, index: int, _: Tensor) -> None:
        self._arrived[index] += 1
        if self._parts is None or self._arrived[index] < self._parts[index]:
            return
        if self._arrived[index] > self._parts[index]:
            raise RuntimeError("a gradient arrived after its tensor had stepped: a bug")
        self._optimizer.step_now(self._units[index])

    def finish(self) -> None:
        """Ends a backward pass; the first time, learns the numbers of parts and steps all units."""
        if self._parts is None:
            self._parts = list(self._arrived)
            for unit in self._units:
                self._optimizer.step_now(unit)
        elif self._arrived != self._parts:
            raise RuntimeError("the backward pass left gradients out: a bug")
        self._arrived = [0] * len(self._units)
