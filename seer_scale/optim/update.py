"""The arithmetic of one step of SGD with LARC on flat tensors, at memory's speed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# Elements that one core takes through all operations before the next: half a MiB of each tensor
# stays in its caches, so main memory is read and written once and not once an operation.
CHUNK = 1 << 17
ROW = 256  # elements whose squares are added in float32


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
    """g <- on_grad * g + on_value * p, m <- momentum * m + g, p <- p - lr * m, all in place.

    With Nesterov's momentum p <- p - lr * (g + momentum * m). A GPU decides by itself whether the
    step is skipped; then p and m stay as they are, bit for bit.

    Args:
        values: p of every tensor, flat.
        grads: g, which are used up.
        momenta: m.
        on_grad: a factor [] for each.
        on_value: the same.
        skipped: [] bool.
        lr: learning rate.
        momentum: share of the momentum that is kept.
        nesterov: Nesterov's momentum.
    """
    # A GPU decides by itself; what has no memory, as in an estimate, cannot be asked at all.
    if values[0].device.type != "cpu" or isinstance(values[0], FakeTensor):
        fused_update_(values, grads, momenta, on_grad, on_value, skipped, lr, momentum, nesterov)
        return
    if skipped:  # what is on the host need not be waited for
        return
    for value, grad, velocity, a, b in zip(values, grads, momenta, on_grad, on_value, strict=True):
        for p, g, m in zip(_chunks(value), _chunks(grad), _chunks(velocity), strict=True):
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
    """The same in three calls for all tensors, for a GPU; without momentum m stays as it is.

    On a CPU torch's fused step rounds an element by where it stands in the tensor, so that shards
    would differ from the whole in the last bit.
    """
    torch._foreach_mul_(grads, on_grad)
    torch._foreach_addcmul_(grads, values, on_value)
    torch._fused_sgd_(
        values,
        grads,
        momenta if momentum > 0 else [],  # torch refuses any for 0
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
    """Norms of flat tensors as float64, exact enough not to depend on how a tensor is cut.

    On a CPU torch's norm in float64 takes twenty times as long as reading the tensor. Large tensors
    are squared and summed in rows of float32 there, and the rows' norms in float64, which was seen
    to be good to ten digits; a sum of float32 alone lost four in eight million elements.
    """
    if tensors[0].device.type != "cpu":
        return list(torch._foreach_norm(tensors, dtype=torch.float64))
    small = [index for index, tensor in enumerate(tensors) if tensor.numel() < CHUNK]
    norms = [tensors[0].new_empty((), dtype=torch.float64)] * len(tensors)
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


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor, CHUNK * torch.get_num_threads())
