"""Arithmetic of one step of SGD with momentum on flat tensors, at the speed of the memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Elements that one core takes through all operations before the next elements: half a MiB of each
# tensor stays in its caches, so that main memory is read and written once, not once per operation.
CHUNK = 1 << 17
ROW = 256  # number of elements whose squares are added in float32


def update_(
    values: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    *,
    on_grad: list[Tensor],
    on_value: list[Tensor],
    skipped: Tensor,
    lr: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """Computes g <- on_grad * g + on_value * p, m <- momentum * m + g, p <- p - lr * m, in place.

    With Nesterov's momentum p <- p - lr * (g + momentum * m); both as `torch.optim.SGD` without
    dampening. A skipped step leaves p and m as they are, bit for bit; a GPU decides this without
    the host.

    Args:
        values: p of each of N tensors, flat [n].
        grads: g of each tensor, [n]; overwritten.
        momenta: m of each tensor, [n].
        on_grad: factor of each g, [].
        on_value: factor of each p, [].
        skipped: whether to leave the step out, [] bool.
        lr: learning rate.
        momentum: share of the momentum that is kept.
        nesterov: use Nesterov's momentum.
    """
    # A GPU decides without the host; a fake tensor, as in an estimate, has no value to read.
    if values[0].device.type != "cpu" or isinstance(values[0], FakeTensor):
        fused_update_(values, grads, momenta, on_grad, on_value, skipped, lr, momentum, nesterov)
        return
    if skipped:  # on the host, so that reading it waits for nothing
        return
    most = CHUNK * torch.get_num_threads()
    for *tensors, a, b in zip(values, grads, momenta, on_grad, on_value, strict=True):
        for p, g, m in zip(*(_chunks(tensor, most) for tensor in tensors), strict=True):
            g.mul_(a).addcmul_(p, b)
            m.mul_(momentum).add_(g)
            p.add_(g.add_(m, alpha=momentum) if nesterov else m, alpha=-lr)


def fused_update_(
    values: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    on_grad: list[Tensor],
    on_value: list[Tensor],
    skipped: Tensor,
    lr: float,
    momentum: float,
    nesterov: bool,
) -> None:
    """Computes `update_` in three calls for all tensors, for a GPU; for momentum 0, m is not used.

    The first two calls are two small kernels a tensor inside: torch joins only lists of equal
    shapes into one, and a factor is one number beside a tensor.

    On a CPU the rounding of torch's fused step depends on the place of an element in the tensor, so
    that shards would differ from the whole tensor in the last bit.
    """
    torch._foreach_mul_(grads, on_grad)
    torch._foreach_addcmul_(grads, values, on_value)
    torch._fused_sgd_(
        values,
        grads,
        momenta if momentum > 0 else [],  # torch refuses them for momentum 0
        lr=lr,
        momentum=momentum,
        nesterov=nesterov and momentum > 0,
        weight_decay=0.0,
        dampening=0.0,
        maximize=False,
        is_first_step=False,
        found_inf=skipped.float(),
    )


def wide_norms(tensors: list[Tensor]) -> list[Tensor]:
    """Computes norms [] of flat tensors [n] in float64, independent of how a tensor is cut.

    On a CPU torch's norm in float64 takes twenty times as long as reading the tensor. There, large
    tensors are squared and summed in float32 rows, and the norms of the rows in float64. This was
    measured to be good to ten digits; a sum in float32 alone lost four digits in eight million
    elements.
    """
    if tensors[0].device.type != "cpu":
        return list(torch._foreach_norm(tensors, dtype=torch.float64))
    small = [index for index, tensor in enumerate(tensors) if 0 < tensor.numel() < CHUNK]
    norms = [tensors[0].new_zeros((), dtype=torch.float64)] * len(tensors)
    if small:
        found = torch._foreach_norm([tensors[i] for i in small], dtype=torch.float64)
        for index, norm in zip(small, found, strict=True):
            norms[index] = norm
    for index, tensor in enumerate(tensors):
        if tensor.numel() >= CHUNK:
            whole = len(tensor) // ROW * ROW
            rows = torch.linalg.vector_norm(tensor[:whole].view(-1, ROW), dim=1).double()
            parts = torch.cat([rows, tensor[whole:].double()])
            norms[index] = torch.linalg.vector_norm(parts)
    return norms


def _chunks(tensor: Tensor, most: int) -> Sequence[Tensor]:
    # Most tensors are small, and a split takes longer than the operations on one.
    return (tensor,) if len(tensor) <= most else torch.split(tensor, most)
