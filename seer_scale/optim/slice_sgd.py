"""SGD with LARC on slices: exact whatever a strategy leaves of a tensor on this rank.

DDP hands whole tensors to the optimizer, ZeRO contiguous flat partitions. With one parameter group
per tensor both are a slice (name, shape, offset), and norms of whole tensors are one stacked
all-reduce away. Everything acts on the float32 master, so every engine propagates the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.models.padding import Padding
from seer_scale.optim.slices import Slice, extent, local
from seer_scale.optim.update import update_, wide_norms
from seer_scale.parallel.precision import LossScale

MOMENTUM = "momentum_buffer"


def parameter_groups(
    model: nn.Module,
    *,
    unit_rows: frozenset[str],
    paddings: Mapping[str, Padding] | None = None,
) -> list[dict[str, Any]]:
    """One group per tensor, which is what makes a ZeRO partition a slice of a single tensor.

    Args:
        model: whole or partitioned; the shapes recorded are those of the whole tensors.
        unit_rows: names of matrices whose rows are kept at length one (the prototypes).
        paddings: of tensors with aligned channels, which slices take along.
    """
    return [
        {
            "params": [parameter],
            "name": name,
            "shape": _whole_shape(parameter),
            "unit_rows": name in unit_rows,
            "frozen": False,
            "padding": (paddings or {}).get(name),
        }
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def _whole_shape(parameter: Tensor) -> tuple[int, ...]:
    for attribute in ("ds_shape", "_orig_size"):  # of what DeepSpeed and FairScale have cut
        if hasattr(parameter, attribute):
            return tuple(getattr(parameter, attribute))
    return tuple(parameter.shape)


def apply_schedule(
    groups: list[dict[str, Any]], *, lr: float, frozen: frozenset[str] = frozenset()
) -> None:
    """Sets this step's learning rate and which tensors stay exactly as they are."""
    for group in groups:
        group["lr"] = lr
        group["frozen"] = group["name"] in frozen


class SliceSGD(torch.optim.Optimizer):
    """SGD with momentum, weight decay, LARC (You et al. 2017; clip off) and unit-norm rows.

    For a tensor p with gradient g, LARC (trust coefficient t) uses
        ratio = t * |p| / (|g| + weight_decay * |p| + eps),    g <- ratio * (g + weight_decay * p)
    and leaves g as it is, without weight decay, where |p| or |g| is 0, as SEER's implementation
    does. Then m <- momentum * m + g and p <- p - lr * m, with Nesterov's momentum
    p <- p - lr * (g + momentum * m). Rows of `unit_rows` tensors are scaled
    back to length one afterwards (SwAV's rule for prototypes). A `frozen` tensor keeps its values,
    and neither gradient, decay nor momentum of a frozen step is remembered.

    A step whose gradient is not finite, in any tensor on any rank, leaves values and momentum as
    they are, bit for bit: the device decides, from the reduced norms; the host need not wait. Where
    tensors step one by one (`step_now`, and ZeRO without `reduce_norms`) each is decided alone.

    Args:
        groups: from `parameter_groups`.
        shards: ranks that each hold one part of every tensor; 1 if tensors are whole. See
            `slices.extent` for the parts there may be.
        shard_group: those ranks; the world unless given.
        trust_coefficient: LARC's t; None for plain SGD.
        loss_scale: what the gradients are multiplied by, for float16; a step whose gradients
            overflow is skipped, on every rank alike.
        nesterov: Nesterov's momentum, as torch's SGD has it.
        momentum_on_host: keep the momentum in (pinned) host memory and bring over one tensor's at
            a time: less device memory for more traffic.
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
        self.trust_coefficient = trust_coefficient
        self.nesterov = nesterov
        self.shards, self.shard_group = shards, shard_group
        self.loss_scale = loss_scale
        self.momentum_on_host = momentum_on_host
        self._rank = dist.get_rank(shard_group) if shards > 1 else 0
        self._squared_grad_norms: list[Tensor] = []
        self._norms: dict[str, Tensor] = {}  # [value norm, gradient norm] of the coming step
        self._whole: Tensor | None = None  # whether all of those are finite, [] bool
        self._extents: dict[str, tuple[int, int]] = {}

    def slices(self) -> Iterator[Slice]:
        """This rank's slices, in parameter order; those that are padding only are left out."""
        for group in self.param_groups:
            for parameter in group["params"]:
                offset, length = self._extent(group, parameter)
                if length > 0:
                    yield Slice(
                        group["name"],
                        group["shape"],
                        offset,
                        local(parameter.detach()).view(-1)[:length],
                        self._momentum(parameter).view(-1)[:length],
                        group.get("padding"),
                    )

    @torch.no_grad()
    def reduce_norms(self, gradients: Mapping[str, Sequence[Tensor]]) -> None:
        """Reduces the norms of a whole step at once, for engines that step tensor by tensor.

        Without it every `step` reduces the norms of the tensors it is given; with a loss scale it
        is needed, since one tensor's overflow has to skip the step of all.

        Args:
            gradients: by tensor name this rank's slice of the gradient, in consecutive pieces.
        """
        present = self._present(lambda group, _: group["name"] in gradients)
        if not present:
            return
        values = [self._valid(group, parameter, parameter) for group, parameter in present]
        grads = [
            self._valid(group, parameter, _joined(gradients[group["name"]]))
            for group, parameter in present
        ]
        norms = self._whole_norms(values, grads)  # [2, tensors]
        if self.loss_scale:
            self._rescale(norms)
        self._norms = dict(zip([group["name"] for group, _ in present], norms.T, strict=True))
        self._whole = norms[1].isfinite().all()

    def take_grad_norm(self) -> Tensor:
        """Norm of the last step's gradient over all tensors that were free to move, [] float64.

        Not finite after a step that was skipped, and after no other.
        """
        squares, self._squared_grad_norms = self._squared_grad_norms, []
        if self.loss_scale and self.loss_scale.overflowed:
            return torch.full((), math.inf)
        # In float64 no finite norm has an infinite square.
        return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Updates every tensor that has a gradient, which is used up.

        ZeRO calls this once per tensor and empties the other groups, others once for all: norms
        not yet known are reduced together for whatever is present.
        """
        del closure
        self._update(self._present(lambda _, parameter: parameter.grad is not None))

    @torch.no_grad()
    def step_now(self, parameters: Iterable[Tensor]) -> None:
        """Updates these tensors, whose gradients are complete, and frees the gradients.

        For stepping inside the backward pass; every rank calls it in the same order.
        """
        wanted = {id(parameter): parameter for parameter in parameters}
        self._update([(self._group_of[key], wanted[key]) for key in wanted])
        for parameter in wanted.values():
            parameter.grad = None

    def _update(self, present: list[tuple[dict[str, Any], Tensor]]) -> None:
        if not present:
            return
        values = [self._valid(group, parameter, parameter) for group, parameter in present]
        grads = [self._valid(group, p, p.grad) for group, p in present]
        names = [group["name"] for group, _ in present]
        if all(name in self._norms for name in names):
            norms = torch.stack([self._norms.pop(name) for name in names], dim=1)
            assert self._whole is not None
            finite = self._whole
        else:
            norms = self._whole_norms(values, grads)  # [2, tensors]
            if self.loss_scale:
                self._rescale(norms)
            finite = norms[1].isfinite().all()
        if self.loss_scale and self.loss_scale.overflowed:
            return
        skipped = ~finite
        scale = 1 / self.loss_scale.stepped_with if self.loss_scale else 1.0
        first = present[0][0]  # weight decay, momentum and eps are those of all tensors
        on_grad, on_value = self._coefficients(norms, first["weight_decay"], first["eps"])
        factors = list(zip((on_grad * scale).unbind(), on_value.unbind(), strict=True))
        squares = norms[1].double().square().unbind()
        free = [index for index, (group, _) in enumerate(present) if not group["frozen"]]
        self._squared_grad_norms += [squares[index] for index in free]
        for lr, together in self._together(present, free):
            kept = [self._valid(*present[i], self._momentum(present[i][1])) for i in together]
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
                momentum=first["momentum"],
                nesterov=self.nesterov,
            )
            for own, moved in zip(kept, momenta, strict=True):
                if moved is not own:
                    own.copy_(moved, non_blocking=True)
        for index in free:
            if present[index][0]["unit_rows"]:
                self._normalise_rows(*present[index], skipped)

    def _together(
        self, present: list[tuple[dict[str, Any], Tensor]], free: list[int]
    ) -> Iterator[tuple[float, list[int]]]:
        """Which tensors are updated at once: those of a learning rate.

        From host memory one by one, so that one momentum at a time is on the device.
        """
        by_rate: dict[float, list[int]] = {}
        for index in free:
            by_rate.setdefault(present[index][0]["lr"], []).append(index)
        for lr, indices in by_rate.items():
            if self.momentum_on_host:
                yield from ((lr, [index]) for index in indices)
            else:
                yield lr, indices

    def _rescale(self, norms: Tensor) -> None:
        """Brings gradient norms back to their true size; decides whether the step is skipped."""
        assert self.loss_scale is not None
        self.loss_scale.update(overflow=not bool(norms[1].isfinite().all()))
        norms[1] /= self.loss_scale.stepped_with

    @cached_property
    def _group_of(self) -> dict[int, dict[str, Any]]:
        return {id(p): group for group in self.param_groups for p in group["params"]}

    def _present(
        self, wanted: Callable[[dict[str, Any], Tensor], bool]
    ) -> list[tuple[dict[str, Any], Tensor]]:
        """The tensors of this call; frozen ones too where their overflow is of interest."""
        return [
            (group, parameter)
            for group in self.param_groups
            if self.loss_scale or not group["frozen"]
            for parameter in group["params"]
            if wanted(group, parameter)
        ]

    def _valid(self, group: dict[str, Any], parameter: Tensor, tensor: Tensor | None) -> Tensor:
        """`tensor`, shaped like this rank's slice, as a flat view without the padding."""
        assert tensor is not None
        return local(tensor).view(-1)[: self._extent(group, parameter)[1]]

    def _whole_norms(self, values: list[Tensor], grads: list[Tensor]) -> Tensor:
        # In float64 a sum does not depend, once rounded, on how it is cut: every strategy takes the
        # same step, not only nearly the same.
        norms = torch.stack(wide_norms([*values, *grads]))
        if self.shards > 1:
            norms = distributed.all_reduce(norms.square(), group=self.shard_group).sqrt()
        return norms.to(values[0].dtype).view(2, -1)

    def _coefficients(
        self, norms: Tensor, weight_decay: float, eps: float
    ) -> tuple[Tensor, Tensor]:
        """What the gradient and the value are multiplied by in the update, [tensors] each."""
        value_norm, grad_norm = norms
        if self.trust_coefficient is None:
            return torch.ones_like(grad_norm), torch.full_like(grad_norm, weight_decay)
        ratio = self.trust_coefficient * value_norm
        ratio = ratio / (grad_norm + weight_decay * value_norm + eps)
        adapt = (value_norm > 0) & (grad_norm > 0)
        one, zero = torch.ones_like(ratio), torch.zeros_like(ratio)
        return torch.where(adapt, ratio, one), torch.where(adapt, ratio * weight_decay, zero)

    def _extent(self, group: dict[str, Any], parameter: Tensor) -> tuple[int, int]:
        """Where this rank's slice starts in the tensor, and its length without padding."""
        # Remembered: a partition that is swapped out to NVMe has no elements to tell it by.
        name = group["name"]
        if name not in self._extents:
            self._extents[name] = extent(parameter, group["shape"], self._rank, self.shards)
        return self._extents[name]

    def _momentum(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if MOMENTUM not in state:
            like = local(parameter.detach())
            on_host = self.momentum_on_host and like.is_cuda
            state[MOMENTUM] = (
                torch.zeros(like.shape, dtype=like.dtype, pin_memory=True)
                if on_host
                else torch.zeros_like(like)
            )
        momentum: Tensor = state[MOMENTUM]
        return momentum

    def _normalise_rows(self, group: dict[str, Any], parameter: Tensor, skipped: Tensor) -> None:
        offset, length = self._extent(group, parameter)
        flat = local(parameter.detach()).view(-1)
        rows, width = group["shape"]
        first, lead = divmod(offset, width) if length else (0, 0)  # else: padding only
        # Zeros complete the slice to whole rows; the all-reduce completes their sums.
        touched = -(-(lead + length) // width)
        padded = flat.new_zeros(touched * width)
        padded[lead : lead + length] = flat[:length]
        squared = flat.new_zeros(rows, dtype=torch.float64)
        squared[first : first + touched] = padded.view(touched, width).double().square().sum(1)
        if self.shards > 1:
            distributed.all_reduce(squared, group=self.shard_group)
        norms = squared.sqrt().clamp_min_(1e-12)[first : first + touched].to(flat.dtype)
        norms = norms.masked_fill_(skipped, 1)  # or rows would change in their last bit
        padded = padded.view(touched, width).div_(norms[:, None]).view(-1)
        flat[:length] = padded[lead : lead + length]


def _joined(pieces: Sequence[Tensor]) -> Tensor:
    # One piece, which is the rule, is not copied: a copy of each would be the gradients once more.
    return pieces[0] if len(pieces) == 1 else torch.cat([piece.view(-1) for piece in pieces])
