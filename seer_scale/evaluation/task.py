"""What every evaluation task gets and gives: a `Context` in, a `Result` out.

A task is a module of this package with `class Options(TaskOptions)`, whose fields are what the
command line takes as `key=value`, and `run(context, options) -> Result`. All ranks call `run`
alike; the result is the same on all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn


class TaskOptions(BaseModel):
    """Base of a task's options: immutable, no unknown keys; fields have descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


@dataclass(frozen=True)
class Context:
    """What a task works with.

    Attributes:
        model: the source as the user gave it, for messages and records.
        trunk: in eval mode on `device`; images [B, 3, H, W] to features [B, C]. A task that trains
            it may change it.
        trunk_name: key of `TRUNKS`.
        data: path or address of the data, as the user gave it.
        folder: of this evaluation; holds what a resumed one goes on from, and pictures.
        device: of this rank.
        say: tells the user something, on rank 0.
        labels: file of labels instead of those that the data's layout tells, if any.
        features: folder that keeps features from one evaluation to the next; `folder/features`
            unless given.
    """

    model: str
    trunk: nn.Module
    trunk_name: str
    data: str
    folder: Path
    device: torch.device
    say: Callable[[str], None]
    labels: str | None = None
    features: Path | None = None


@dataclass(frozen=True)
class Result:
    """What a task found.

    Attributes:
        metrics: numbers by name, such as `top1` (shares are between 0 and 1).
        details: JSON values beside them: sweeps, options chosen, counts.
        pictures: files to be logged, on rank 0.
    """

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[Path, ...] = ()
