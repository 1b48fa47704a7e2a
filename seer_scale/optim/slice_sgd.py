"""SGD with LARC on slices: exact for any part of a tensor that a strategy leaves on this rank.

DDP gives whole tensors to the optimizer, FSDP rows, ZeRO flat partitions of many tensors. All are
parts (`parts.Part`), and one stacked all-reduce gives the norms of the whole tensors. The step acts
on the float32 masters, so every engine propagates the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from seer_scale.optim import larc
from seer_scale.optim.loss_scale import LossScale
from seer_scale.optim.parts import Part, cut_pieces, parts_of
from seer_scale.optim.pinned_memory import pinned
from seer_scale.optim.slices import Slice, local
from seer_scale.optim.unit_rows import normalise_rows_
from seer_scale.optim.update import update_

MOMENTUM = "momentum_buffer"


def apply_schedule(
    groups: list[dict[str, Any]], *, lr: float, frozen: frozenset[str] = frozenset()
) -> None:
    """Sets the learning rate of this step, and which tensors the step leaves exactly as they are.

    Args:
        groups: the optimizer's settings per tensor (`SliceSGD.tensors`).
        lr: learning rate of every tensor.
        frozen: names of the tensors that do not move.
    """
    for group in groups:
        group["lr"] = lr
        group["frozen"] = group["name"] in frozen


class SliceSGD(torch.optim.Optimizer):
    """SGD with momentum, weight decay, LARC (see `larc`) and rows of unit length.

    With the gradient g that LARC returns, m <- momentum * m + g and p <- p - lr * m; with
    Nesterov's momentum p <- p - lr * (g + momentum * m). Both are `torch.optim.SGD` without
    dampening. Rows of `unit_rows` tensors are scaled back to length one after the step. A `frozen`
    tensor keeps its values, and its momentum remembers nothing of a frozen step.

    A step whose gradient is not finite, in any tensor on any rank, leaves values and momentum as
    they are, bit for bit. The device decides this from the reduced norms; the host need not wait.
    Where tensors step one by one (`step_now`, and ZeRO without `reduce_norms`) each tensor is
    decided alone.

    This rank holds a slice [n] of p, g and m of every tensor p [shape].

    Args:
        groups: from `parameter_groups` or `join`. A tensor may have its own `weight_decay`,
            `momentum` and `eps`, set before or after the optimizer is built; the others have those
            given below.
        lr: learning rate until `apply_schedule` sets another.
        momentum: share of m that is kept.
        weight_decay: factor of p that is added to g.
        trust_coefficient: LARC's t; None for plain SGD.
        nesterov: use Nesterov's momentum.
        shards: ranks that hold one part each; 1 if tensors are whole. See `slices.extent` and
            `parts.parts_of` for the parts that are possible.
        shard_group: those ranks; None for the world.
        loss_scale: factor that the gradients carry, for float16. A step whose gradients overflow is
            skipped on every rank.
        momentum_on_host: keep the momentum in pinned host memory, one tensor at a time on the GPU.
        eps: LARC's eps.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float = 0.0,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float | None,
        nesterov: bool = False,
        shards: int = 1,
        shard_group: dist.ProcessGroup | None = None,
        loss_scale: LossScale | None = None,
        momentum_on_host: bool = False,
        eps: float = 1e-8,
    ) -> None:
        super().__init__(
            groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "eps": eps}
        )
        self.tensors: list[dict[str, Any]] = [
            tensor for group in self.param_groups for tensor in group.get("tensors", [group])
        ]
        for tensor in self.tensors:
            for key, value in self.defaults.items():
                tensor.setdefault(key, value)
        self.trust_coefficient = trust_coefficient
        self.nesterov = nesterov
        self.shards, self.shard_group = shards, shard_group
        self.loss_scale = loss_scale
        self.momentum_on_host = momentum_on_host
        self._rank = dist.get_rank(shard_group) if shards > 1 else 0
        self._squared_grad_norms: list[Tensor] = []
        self._norms: dict[str, Tensor] = {}  # [value norm, gradient norm] of the coming step
        self._whole: Tensor | None = None  # whether all of those are finite, [] bool
        self._parts: dict[Tensor, list[Part]] = {}

    def slices(self) -> Iterator[Slice]:
        """Yields this rank's slices, in parameter order; slices of padding only are left out."""
        for group in self.param_groups:
            for holder in group["params"]:
                values, momentum = holder.detach(), self._momentum(holder)
                for part in self._parts_of(group, holder):
                    if part.length > 0:
                        yield Slice(
                            part.tensor["name"],
                            part.tensor["shape"],
                            part.offset,
                            part.of(values),
                            part.of(momentum),
                            part.tensor.get("padding"),
                        )

    @torch.no_grad()
    def reduce_norms(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Reduces the norms of a whole step at once, for engines that step group by group.

        Without this call every `step` reduces the norms of its own tensors. A loss scale needs this
        call, because the overflow of one tensor has to skip the step of all.

        Args:
            gradients: name of a group -> gradient of what this rank holds, in consecutive pieces.
        """
        parts: list[Part] = []
        grads: list[Tensor] = []
        for group in self.param_groups:
            if group["name"] in gradients:
                for holder in group["params"]:
                    own = self._moving(self._parts_of(group, holder))
                    parts += own
                    grads += cut_pieces(gradients[group["name"]], own)
        if not parts:
            return
        norms = self._whole_norms([part.of(part.holder) for part in parts], grads)
        names = [part.tensor["name"] for part in parts]
        self._norms = dict(zip(names, norms.unbind(1), strict=True))
        self._whole = norms[1].isfinite().all()

    def take_grad_norm(self) -> Tensor:
        """Returns the norm of the last step's gradient over all tensors not frozen, [] float64.

        The norm is not finite after a skipped step, and only then.
        """
        squares, self._squared_grad_norms = self._squared_grad_norms, []
        if self.loss_scale and self.loss_scale.overflowed:
            return torch.full((), math.inf)
        # In float64 no finite norm has an infinite square.
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every tensor that has a gradient; the gradients are overwritten.

        ZeRO calls this once per group with all other groups empty, the other engines once for all
        tensors. Norms that are not known yet are reduced together for the tensors of the call.
        """
        del closure
        self._update(
            [
                part
                for group in self.param_groups
                for holder in group["params"]
                if holder.grad is not None
                for part in self._moving(self._parts_of(group, holder))
            ]
        )

    @torch.no_grad()
    def step_now(self, parameters: Iterable[Tensor]) -> None:
        """Updates `parameters`, whose gradients are complete, and frees the gradients.

        This is the step inside the backward pass. Every rank makes these calls in the same order.
        """
        wanted = {id(parameter): parameter for parameter in parameters}
        parts = [self._parts_of(self._group_of[key], wanted[key]) for key in wanted]
        self._update([part for own in parts for part in own])
        for parameter in wanted.values():
            parameter.grad = None

    def _update(self, parts: list[Part]) -> None:
        if not parts:
            return
        values = [part.of(part.holder) for part in parts]
        grads = [part.of(part.holder.grad) for part in parts]
        names = [part.tensor["name"] for part in parts]
        if all(name in self._norms for name in names):
            norms = torch.stack([self._norms.pop(name) for name in names], dim=1)
            assert self._whole is not None
            finite = self._whole
        else:
            norms = self._whole_norms(values, grads)
            finite = norms[1].isfinite().all()
        if self.loss_scale and self.loss_scale.overflowed:
            return
        skipped = ~finite
        factors = larc.factors(
            norms,
            [part.tensor for part in parts],
            trust_coefficient=self.trust_coefficient,
            scale=1 / self.loss_scale.stepped_with if self.loss_scale else 1.0,
        )
        squares = norms[1].double().square().unbind()
        free = [index for index, part in enumerate(parts) if not part.tensor["frozen"]]
        self._squared_grad_norms += [squares[index] for index in free]
        for lr, momentum, together in self._together(parts, free):
            kept = [parts[i].of(self._momentum(parts[i].holder)) for i in together]
            momenta = [
                own.to(values[i].device, non_blocking=True)
                for i, own in zip(together, kept, strict=True)
            ]
            update_(
                [values[i] for i in together],
                [grads[i] for i in together],
                momenta,
                on_grad=[factors[i][0] for i in together],
                on_value=[factors[i][1] for i in together],
                skipped=skipped,
                lr=lr,
                momentum=momentum,
                nesterov=self.nesterov,
            )
            for own, moved in zip(kept, momenta, strict=True):
                if moved is not own:
                    own.copy_(moved, non_blocking=True)
        for index in free:
            if parts[index].tensor["unit_rows"]:
                normalise_rows_(
                    values[index],
                    parts[index].offset,
                    parts[index].tensor["shape"],
                    skipped=skipped,
                    shards=self.shards,
                    shard_group=self.shard_group,
                )

    def _together(
        self, parts: list[Part], free: list[int]
    ) -> Iterator[tuple[float, float, list[int]]]:
        """Groups what is updated at once: one learning rate and momentum, or one on the host."""
        alike: dict[tuple[float, float], list[int]] = {}
        for index in free:
            tensor = parts[index].tensor
            if parts[index].length:
                alike.setdefault((tensor["lr"], tensor["momentum"]), []).append(index)
        for (lr, momentum), indices in alike.items():
            for part in [[index] for index in indices] if self.momentum_on_host else [indices]:
                yield lr, momentum, part

    @cached_property
    def _group_of(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _moving(self, parts: list[Part]) -> list[Part]:
        """Parts of this step; with a loss scale frozen ones too, for their overflow counts."""
        return [part for part in parts if self.loss_scale or not part.tensor["frozen"]]

    def _whole_norms(self, values: list[Tensor], grads: list[Tensor]) -> Tensor:
        """True norms [2, N] of values and gradients; a loss scale learns of an overflow here."""
        norms = larc.whole_norms(values, grads, shards=self.shards, shard_group=self.shard_group)
        if self.loss_scale:
            self.loss_scale.update(overflow=not bool(norms[1].isfinite().all()))
            norms[1] /= self.loss_scale.stepped_with
        return norms

    def _parts_of(self, group: dict[str, Any], holder: Tensor) -> list[Part]:
        # Remembered, because a partition that is swapped out to NVMe has no elements.
        if holder not in self._parts:
            self._parts[holder] = parts_of(group, holder, self._rank, self.shards)
        return self._parts[holder]

    def _momentum(self, holder: Tensor) -> Tensor:
        if MOMENTUM not in self.state[holder]:
            on_host = self.momentum_on_host and holder.is_cuda
            every = [each for group in self.param_groups for each in group["params"]]
            holders = every if on_host else [holder]
            likes = [local(each.detach()) for each in holders]
            memory = pinned(likes) if on_host else map(torch.empty_like, likes)
            for each, tensor in zip(holders, memory, strict=True):
                self.state[each][MOMENTUM] = tensor.zero_()
        momentum: Tensor = self.state[holder][MOMENTUM]
        return momentum
