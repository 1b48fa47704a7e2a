"""Interface of every evaluation task: a `Context` goes in, a `Result` comes out.

A task is a module of `seer_scale.evaluation.tasks` with `run(context, options) -> Result` and
`Options`, its model in `seer_scale.evaluation.options`. All ranks call `run` together and get the
same result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Context:
    """Inputs of a task.

    Attributes:
        model: source of the trunk as the user gave it, for messages and records.
        trunk: trunk in eval mode on `device`: images [B, 3, H, W] to features [B, C]. A task that
            trains the trunk may change it.
        trunk_name: key of `TRUNKS`.
        data: path or address of the data as the user gave it.
        folder: folder of this evaluation, for the state that a killed one resumes from and for
            pictures.
        device: device of this rank.
        say: prints a line for the user, on rank 0 only.
        labels: file of labels that replaces the labels of the data's layout; None uses the layout.
        features: folder that keeps features for other evaluations; None means `folder/features`.
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
    """Outcome of a task.

    Attributes:
        metrics: numbers by name, such as `top1`; shares are between 0 and 1.
        details: further JSON values: sweeps, chosen options, counts.
        pictures: files to log, on rank 0.
    """

    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)
    pictures: tuple[Path, ...] = ()
