"""Contexts for tests of tasks, and for the ranks of their pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seer_scale.data import Source, open_source
from seer_scale.evaluation import session
from seer_scale.evaluation.features import measure_batch_norm
from seer_scale.evaluation.options import OPTIONS
from seer_scale.evaluation.task import Context, Result
from seer_scale.models import build_trunk

TRUNK = "regnety_debug"


def context(data: Path | str, folder: Path, **more: Any) -> Context:
    """Builds a context of an untrained trunk whose BatchNorm has seen the images."""
    trunk = build_trunk(TRUNK, device="cpu").eval()
    first = Path(str(data).partition(",")[0])
    source = open_source(first / "train" if (first / "train").is_dir() else first)
    measure_batch_norm(trunk, _First(source, 64), size=32)
    fields = {"labels": None, "features": None, "say": _say_nothing, **more}
    return Context(
        model="test",
        trunk=trunk,
        trunk_name=TRUNK,
        data=str(data),
        folder=folder,
        device=torch.device("cpu"),
        **fields,
    )


def run_task(task: str, data: str, folder: str, options: dict[str, Any]) -> Result:
    """Runs a task; called on every rank of a pool."""
    return session.run_task(task, context(data, Path(folder)), OPTIONS[task](**options))


class _First:
    """The first `count` images of a source."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count
        self.read, self.name, self.label = source.read, source.name, source.label
        self.version, self.shard_sizes = source.version, source.shard_sizes
        self.left_out = source.left_out

    def __len__(self) -> int:
        return min(self._count, len(self._source))


def _say_nothing(text: str) -> None:
    pass
