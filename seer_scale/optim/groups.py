"""Parameter groups of `SliceSGD`: one per tensor, or tensors joined end to end for ZeRO."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from seer_scale.models.padding import Padding

# Elements of a group of joined tensors at ZeRO's stages 1 and 2, 1 GiB: DeepSpeed copies a whole
# group when it starts.
MOST_JOINED = 1 << 28
# Elements of a rank's share of a group at stage 3, 256 MiB: DeepSpeed copies its gradient.
MOST_HELD = 1 << 26


def parameter_groups(
    model: nn.Module,
    *,
    unit_rows: frozenset[str],
    paddings: Mapping[str, Padding] | None = None,
) -> list[dict[str, Any]]:
    """Creates one group per tensor.

    A group holds `params` (one tensor), its `name` and whole `shape`, and whether it has
    `unit_rows`, is `frozen` or has `padding`.

    Args:
        model: whole or partitioned; the recorded shapes are those of the whole tensors.
        unit_rows: names of matrices whose rows are kept at length one (the prototypes).
        paddings: padding of tensors with aligned channels, by name; slices take it along.
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


def join(groups: Sequence[dict[str, Any]], *, most: int, cut_first: bool) -> list[dict[str, Any]]:
    """Joins the tensors of consecutive groups, for ZeRO.

    DeepSpeed cuts every group over all ranks in Python, and reduces and gathers group by group. One
    group per tensor costs tensors x ranks such cuts at every step; few groups cost few.

    A joined group holds `params`, and `tensors`: the former groups, without `params` but with all
    settings of their own. See `parts.parts_of` for the slice of each.

    Args:
        groups: from `parameter_groups`.
        most: elements that a group of several tensors has at most.
        cut_first: whether a rank holds a part of every tensor, and the parts are joined (ZeRO 3);
            otherwise the joined tensors are cut into one part for each rank (ZeRO 1 and 2).
    """
    lists: list[list[dict[str, Any]]] = []
    elements = 0
    for group in groups:
        size = math.prod(group["shape"])
        if not lists or elements + size > most:
            lists.append([])
            elements = 0
        lists[-1].append(group)
        elements += size
    return [
        {
            "params": [tensor for group in together for tensor in group["params"]],
            "name": together[0]["name"],
            "cut_first": cut_first,
            "tensors": [
                {key: value for key, value in group.items() if key != "params"}
                for group in together
            ],
        }
        for together in lists
    ]


def _whole_shape(parameter: Tensor) -> tuple[int, ...]:
    for attribute in ("ds_shape", "_orig_size"):  # set by DeepSpeed and FairScale on partitions
        if hasattr(parameter, attribute):
            return tuple(getattr(parameter, attribute))
    return tuple(parameter.shape)
