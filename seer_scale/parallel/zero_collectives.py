"""ZeRO 3's work before a reduction and after a gathering; more ranks mean no more calls.

DeepSpeed cuts every tensor for every rank in Python: 1.4 s of a backward pass for 371 tensors at
512 ranks. The functions here give the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def reduce_scatter_mean(
    tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None
) -> list[Tensor]:
    """Averages tensors over the ranks and returns this rank's part of each, by one reduce-scatter.

    Args:
        tensors: the same tensors on every rank, of one type.
        group: the ranks; None for the world.

    Returns:
        a flat part of each tensor: equal parts in the order of ranks, the last ones shorter.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    flat = [tensor.reshape(-1) for tensor in tensors]
    # A row per rank, which holds that rank's part of every tensor, filled up with zeros.
    rows = torch._chunk_cat(flat, dim=0, num_chunks=ranks).div_(ranks)
    own = rows.new_empty(rows.shape[1])
    dist.reduce_scatter_tensor(own, rows.view(-1), group=group)
    parts, start = [], 0
    for tensor in flat:
        share = -(-len(tensor) // ranks)
        parts.append(own[start : start + max(0, min(share, len(tensor) - rank * share))])
        start += share
    return parts


@torch.no_grad()
def whole_tensors(gathered: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Puts gathered parts together, each tensor in memory of its own if there are several.

    A view of a column would keep all gathered parts alive as long as its tensor.

    Args:
        gathered: a row per rank, which holds that rank's part of every tensor, filled up,
            [ranks, sum of parts].
        shapes: shapes of the whole tensors.
    """
    found, start = [], 0
    for shape in shapes:
        size = shape.numel()
        share = -(-size // len(gathered))
        found.append(gathered[:, start : start + share].contiguous().view(-1)[:size].view(shape))
        start += share
    return found


def wait_for_gathered(original: Any, handle: Any, handle_dependency: bool = True) -> None:
    """Stands in for `AllGatherCoalescedHandle.wait`, which cuts in Python for every rank."""
    if handle.complete or handle.quantization or handle.use_secondary_tensor:
        original(handle, handle_dependency)
        return
    handle.allgather_handle.wait()
    first = handle.partitions[0]  # the partitions follow each other in one tensor
    rows = first.as_strided((handle.world_size, len(first)), (len(first), 1))
    wholes = whole_tensors(rows, [parameter.ds_shape for parameter in handle.params])
    for parameter, whole in zip(handle.params, wholes, strict=True):
        parameter.data = whole.to(parameter.ds_tensor.dtype)
        parameter.ds_status = type(parameter.ds_status).AVAILABLE
    handle.complete = True
    if rows.is_cuda:
        if handle_dependency:
            rows.record_stream(torch.cuda.current_stream())
        else:
            handle.data_buffer.append([rows])  # until DeepSpeed has waited
