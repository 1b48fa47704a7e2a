"""The optimizer inside the backward pass: a tensor steps when its gradient is complete.

LARC needs no norm over all tensors, so this is the same step as after the backward pass; but a
gradient is freed at once, and the memory for all of them is never taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from seer_scale.optim.slice_sgd import SliceSGD


class FusedBackward:
    """Steps units of parameters as their gradients become complete.

    Args:
        optimizer: without a loss scale, whose verdict needs all gradients.
        units: parameters that step together, with one reduction of their norms; a tensor's
            gradient has to become complete at the same place on every rank.
        learn: whether a gradient comes in several parts, as many each step, which are counted in
            the first step: FSDP reduces a unit as often as it was called. That step is done at its
            end. Otherwise a gradient is complete when it first appears (autograd's own rule).

    Raises:
        RuntimeError: on a gradient that comes after its tensor has stepped.
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
        """Call after the backward pass: in the first step it learns, and steps everything."""
        if self._parts is None:
            self._parts = list(self._arrived)
            for unit in self._units:
                self._optimizer.step_now(unit)
        elif self._arrived != self._parts:
            raise RuntimeError("the backward pass left gradients out: a bug")
        self._arrived = [0] * len(self._units)
