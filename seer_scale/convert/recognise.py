"""Recognises a trunk by the names and shapes of its tensors; every tensor is accounted for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from seer_scale.convert.heads import Head, find_head
from seer_scale.convert.names import DIALECTS, STEM, Dialect, to_dialect, without_wrappers
from seer_scale.convert.weights import Weights
from seer_scale.errors import CheckpointError
from seer_scale.models.regnet import TRUNKS, build_trunk, trunk_config
from seer_scale.serving import crop_size
from seer_scale.storage.tensor_file import Kind

_COUNTER = "num_batches_tracked"  # of a BatchNorm; nothing is computed from it
_SHOWN = 4  # names in a sentence


@dataclass(frozen=True)
class TrunkWeights:
    """Tensors of a trunk under our names, with heads and notes.

    Attributes:
        origin: the source, for sentences.
        trunk: key of `TRUNKS`.
        dialect: project whose names the source used; torchvision's are also ours.
        kinds: dtype and shape of every tensor, by our name.
        read: a tensor's values on the CPU, by our name.
        head: SwAV head and classifier that the source holds.
        notes: one line each on what was dropped or filled in.
        pretraining: what made the trunk, see `Weights`.
    """

    origin: str
    trunk: str
    dialect: Dialect
    kinds: Mapping[str, Kind]
    read: Callable[[str], Tensor]
    head: Head
    notes: tuple[str, ...]
    pretraining: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """Width of the features."""
        return trunk_config(self.trunk).stages[-1].width

    @property
    def size(self) -> int:
        """Side of the trunk's large training crops in pixels; 224 if the source does not say."""
        return crop_size({"pretraining": self.pretraining})

    def with_notes(self, *notes: str) -> TrunkWeights:
        """Returns the same weights with further notes."""
        return replace(self, notes=self.notes + notes)


def recognise(weights: Weights, trunk: str | None = None) -> TrunkWeights:
    """Names the tensors of a source as ours.

    Args:
        weights: under any dialect's names, with any prefix.
        trunk: key of `TRUNKS` that it has to be; otherwise what the source states, else what the
            shapes say.

    Raises:
        ConfigError: if `trunk` is unknown.
        CheckpointError: if the tensors are not those of one trunk, or some are left over.
    """
    if trunk is not None and weights.trunk not in (None, trunk):
        raise CheckpointError(
            f"{weights.origin} states that it is {weights.trunk}, not {trunk}; leave --trunk out"
        )
    plain: dict[str, str] = {}
    for name in weights.kinds:
        short = without_wrappers(name)
        if short in plain:
            raise CheckpointError(
                f"{weights.origin} holds {short} twice once its wrappers' names are gone"
            )
        plain[short] = name
    dialect, prefix = _dialect(plain, weights.origin)
    found = {
        name.removeprefix(prefix): weights.kinds[full]
        for name, full in plain.items()
        if name.startswith(prefix)
    }
    stated = trunk or weights.trunk
    chosen = stated or min(TRUNKS, key=lambda key: len(_differences(found, key, dialect)))
    if differences := _differences(found, chosen, dialect):
        count, total = len(differences), len(_shapes(chosen))
        if stated:
            raise CheckpointError(
                f"the tensors of {weights.origin} are not those of {chosen}: {count} of {total} "
                f"differ ({_some(differences)})"
            )
        raise CheckpointError(
            f"{weights.origin} is none of the known trunks ({', '.join(TRUNKS)}); nearest is "
            f"{chosen}, of whose {total} tensors {count} differ ({_some(differences)})"
        )
    names = {ours: f"{prefix}{to_dialect(ours, dialect)}" for ours in _shapes(chosen)}
    absent = [ours for ours, theirs in names.items() if theirs not in plain]
    kinds = {
        ours: Kind(torch.int64, ()) if ours in absent else weights.kinds[plain[theirs]]
        for ours, theirs in names.items()
    }
    rest = plain.keys() - set(names.values())
    width = trunk_config(chosen).stages[-1].width
    head, left_over = find_head({name: plain[name] for name in sorted(rest)}, weights, width)
    if left_over:
        raise CheckpointError(
            f"{weights.origin} holds {len(left_over)} tensors that belong neither to {chosen} nor "
            f"to a known head ({_some(left_over)}); remove them from it"
        )
    notes = [*weights.notes, *head.notes]
    if absent:
        notes.append(f"{len(absent)} counters {_COUNTER} are not in the source and are set to 0")

    def read(ours: str) -> Tensor:
        if ours in absent:
            return torch.zeros((), dtype=torch.int64)
        return weights.read(plain[names[ours]])

    return TrunkWeights(
        weights.origin, chosen, dialect, kinds, read, head, tuple(notes), weights.pretraining
    )


def _dialect(names: Mapping[str, str], origin: str) -> tuple[Dialect, str]:
    for dialect in DIALECTS:  # VISSL's first: its stem's name ends with torchvision's
        stem = re.compile(rf"(.*\.)?{re.escape(STEM[dialect])}")
        prefixes = sorted(match[1] or "" for name in names if (match := stem.fullmatch(name)))
        if len(prefixes) > 1:
            raise CheckpointError(
                f"{origin} holds {len(prefixes)} trunks, under {', '.join(map(repr, prefixes))}; "
                "keep one of them"
            )
        if prefixes:
            return dialect, prefixes[0]
    raise CheckpointError(
        f"{origin} does not hold the weights of a RegNet: no stem is named as in "
        f"{', '.join(DIALECTS)} (its tensors: {_some(sorted(names)) or 'none'})"
    )


def _differences(found: Mapping[str, Kind], trunk: str, dialect: Dialect) -> list[str]:
    differences = []
    for ours, shape in _shapes(trunk).items():
        theirs = to_dialect(ours, dialect)
        if theirs not in found:
            if not ours.endswith(_COUNTER):
                differences.append(f"{theirs} is missing")
        elif found[theirs].shape != shape:
            differences.append(f"{theirs} is {list(found[theirs].shape)} instead of {list(shape)}")
    if not differences:
        blocks = {to_dialect(ours, dialect).rpartition(".")[0] for ours in _shapes(trunk)}
        known = {to_dialect(ours, dialect) for ours in _shapes(trunk)}
        tops = {name.split(".")[0] for name in blocks}
        differences += [
            f"{name} is too many"
            for name in found
            if name not in known and name.split(".")[0] in tops
        ]
    return differences


@cache
def _shapes(trunk: str) -> dict[str, tuple[int, ...]]:
    state = build_trunk(trunk, device="meta").state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _some(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return "; ".join(items[:_SHOWN]) + more
