"""The arithmetic of one step of SGD with LARC on flat tensors, at memory's speed."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements that one core takes through all operations before the next: 256 KiB of each tensor stay
# in its second-level cache, so main memory is read and written once and not once an operation.
CHUNK = 1 << 16


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

    With Nesterov's momentum p <- p - lr * (g + momentum * m). The device decides whether the step
    is skipped: then p and m stay as they are, bit for bit.

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
    found_inf = skipped.float()
    triples = [(values, grads, momenta, on_grad, on_value)]
    if values[0].device.type == "cpu":
        triples = [
            ([p], [g], [m], [a], [b])
            for value, grad, kept, a, b in zip(
                values, grads, momenta, on_grad, on_value, strict=True
            )
            for p, g, m in zip(_chunks(value), _chunks(grad), _chunks(kept), strict=True)
        ]
    for p, g, m, a, b in triples:
        torch._foreach_mul_(g, a)
        torch._foreach_addcmul_(g, p, b)
        torch._fused_sgd_(
            p,
            g,
            m,
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            weight_decay=0.0,
            dampening=0.0,
            maximize=False,
            is_first_step=False,
            found_inf=found_inf,
        )


def _chunks(tensor: Tensor) -> tuple[Tensor, ...]:
    return torch.split(tensor, CHUNK * torch.get_num_threads())
