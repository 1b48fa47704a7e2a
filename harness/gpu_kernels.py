"""torch's GPU kernels of SyncBatchNorm on a CPU: the same arguments and results, in plain float64.

Written from what `torch/nn/modules/_functions.py` gives to them and gets. They hold their arguments
to what the kernels of ATen/native/cuda/Normalization.cuh take without asking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

GPU = "seer_scale.parallel.batchnorm_gpu"


@contextmanager
def gpu_kernels(most_gathered: int) -> Iterator[None]:
    """Inside, the CPU has these kernels, and BatchNorm layers take them.

    Args:
        most_gathered: ranks of the largest group that gathers statistics instead of summing them.
    """
    library = torch.library.Library("aten", "IMPL")
    try:
        for kernel in (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt):
            library.impl(f"batch_norm_{kernel.__name__}", kernel, "CPU")
        with patch(f"{GPU}.takes", lambda _: True), patch(f"{GPU}.MOST_GATHERED", most_gathered):
            yield
    finally:
        library._destroy()


def with_gpu_kernels(most_gathered: int, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function inside of `gpu_kernels`."""
    with gpu_kernels(most_gathered):
        return function(*args)


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Computes mean and 1 / sqrt(variance + eps), each [C], of x [B, C, ...]."""
    _check_layout(x)
    rows = _rows(x)
    mean = rows.mean(0)
    inverse_std = ((rows - mean).square().mean(0) + eps).rsqrt()
    return mean.to(_wide(x)), inverse_std.to(_wide(x))


def gather_stats_with_counts(
    x: Tensor,
    means: Tensor,
    inverse_stds: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Combines the ranks' statistics [ranks, C]; updates the running ones, unbiased."""
    assert means.dtype == inverse_stds.dtype == _wide(x)
    assert means.shape == inverse_stds.shape == (len(counts), x.shape[1])
    assert counts.dtype == running_mean.dtype == running_var.dtype
    assert counts.dim() == 1
    mean, variance = torch.zeros(2, means.shape[1], dtype=torch.float64).unbind()
    number = 0.0
    for row in range(len(counts)):
        n = float(counts[row])
        delta = means[row].double() - mean
        own = (inverse_stds[row].double() ** -2 - eps) * n
        variance = variance + own + delta.square() * number * n / (number + n)
        mean = mean + delta * n / (number + n)
        number += n
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_((variance / (number - 1)).to(running_var.dtype), momentum)
    inverse_std = (variance / number + eps).rsqrt()
    return mean.to(_wide(x)), inverse_std.to(_wide(x))


def elemt(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, inverse_std: Tensor, eps: float
) -> Tensor:
    """Normalises x, scales and shifts it."""
    _check_layout(x)
    assert weight.dtype == bias.dtype == mean.dtype == inverse_std.dtype == _wide(x)
    normalised = (_rows(x) - mean) * inverse_std
    return _like(normalised * weight + bias, x)


def backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    for_x: bool,
    for_weight: bool,
    for_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums grad and grad (x - mean) over rows, each [C]; the gradients of weight and bias."""
    assert for_x
    assert for_weight
    assert for_bias
    _check_layout(grad)
    _check_layout(x)
    assert grad.dtype == x.dtype
    assert mean.dtype == inverse_std.dtype == _wide(x)
    rows = _rows(grad)
    total, on_distance = rows.sum(0), (rows * (_rows(x) - mean)).sum(0)
    wide = _wide(x)
    of_weight = (on_distance * inverse_std).to(weight.dtype)
    return total.to(wide), on_distance.to(wide), of_weight, total.to(weight.dtype)


def backward_elemt(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    inverse_std: Tensor,
    weight: Tensor,
    total: Tensor,
    on_distance: Tensor,
    counts: Tensor,
) -> Tensor:
    """Computes the gradient of x from the group's sums [C] and the ranks' counts [ranks]."""
    assert counts.dtype == torch.int32
    assert grad.dtype == x.dtype
    for tensor in (mean, inverse_std, weight, total, on_distance):
        assert tensor.dtype == _wide(x)
    for tensor in (mean, inverse_std, weight, total, on_distance, counts):
        assert tensor.is_contiguous()  # the kernels for channels_last do not look at strides
    _check_layout(grad)
    number = int(counts.sum())
    slope = on_distance.double() * inverse_std.double().square() / number
    centred = _rows(grad) - total / number - (_rows(x) - mean) * slope
    return _like(centred * inverse_std * weight, grad)


def _check_layout(x: Tensor) -> None:
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    assert last or x.is_contiguous(), f"neither contiguous nor channels_last: {x.stride()}"


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> Tensor:
    return x.double().transpose(1, -1).reshape(-1, x.shape[1])


def _like(rows: Tensor, x: Tensor) -> Tensor:
    swapped = x.transpose(1, -1).shape
    return torch.empty_like(x).copy_(rows.reshape(swapped).transpose(1, -1))
