"""Loads a trunk from a folder, a file or a registry as a torch module."""

from __future__ import annotations

import os

from torch import nn

from seer_scale.convert.files import open_weights
from seer_scale.convert.locating import locate
from seer_scale.convert.rebuild import rebuild
from seer_scale.convert.recognise import recognise
from seer_scale.serving import WEIGHTS, load_trunk


def load(source: str | os.PathLike[str], *, tracking_uri: str | None = None) -> nn.Module:
    """Loads a trunk in eval mode on the CPU: images [B, 3, H, W] -> features [B, C].

    Args:
        source: an exported trunk's folder, a checkpoint folder, a run folder (its newest
            checkpoint), a folder for timm or Hugging Face, a file of weights under VISSL's, timm's,
            Hugging Face's, torchvision's or our names, `hf:ORG/NAME`, or `models:/NAME@alias`,
            `models:/NAME/version`, `models:/<model_id>`. A classifier or head is left out.
        tracking_uri: address of the registry; `mlflow.set_tracking_uri`'s, else
            MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db`.

    Raises:
        UserError: if there is no such source, or a server does not answer.
        CheckpointError: if the files are missing or damaged, or are not a known trunk.
    """
    path = locate(source, tracking_uri)
    if (path / WEIGHTS).is_file():
        return load_trunk(path)
    return rebuild(recognise(open_weights(path)))
