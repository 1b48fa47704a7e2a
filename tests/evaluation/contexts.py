"""`Context` as launch/evaluate.py makes it, for tests and for the ranks of their pools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from seer_scale.data import Source, open_source
from seer_scale.evaluation.features import measure_batch_norm
from seer_scale.evaluation.task import Context, Result
from seer_scale.models import build_trunk

TRUNK = "regnety_debug"


def context(data: Path | str, folder: Path, **more: Any) -> Context:
    """An untrained trunk whose BatchNorm has seen the images, so that features are no noise."""
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
    """One task on every rank of a pool."""
    from seer_scale.commands.evaluate import load_task

    loaded = load_task(task)
    return loaded.run(context(data, Path(folder)), loaded.options(**options))


class _First:
    """The first images of a source, for what needs no more."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count
        self.read, self.name, self.label = source.read, source.name, source.label
        self.version, self.shard_sizes = source.version, source.shard_sizes

    def __len__(self) -> int:
        return min(self._count, len(self._source))


def _say_nothing(text: str) -> None:
    pass
