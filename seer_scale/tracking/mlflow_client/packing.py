"""Packs an exported trunk as an MLflow model folder."""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec
from PIL import Image

import seer_scale

_NOT_ON_INDEX = ("python", "seer_scale")
# Of the code that a model carries, beside those in config.json: reading weights and images.
_FOR_IMAGES = (
    "braceexpand",
    "fsspec",
    "opencv-python-headless",
    "pillow",
    "simplejpeg",
    "xxhash",
)


def pack(path: Path, folder: Path, config: Mapping[str, Any], run_id: str, model_id: str) -> None:
    """Writes an MLflow model folder: the exported trunk as data, this package as its code.

    The signature takes any array: numbers [B, 3, H, W], or encoded images [B]. MLflow refuses lists
    and other kinds itself; `serving.FeatureExtractor` checks the rest.
    """
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(object), (-1,))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, config["width"]))]),
    )
    versions = config["versions"].items()
    needed = [f"{name}=={number}" for name, number in versions if name not in _NOT_ON_INDEX]
    needed += [f"{name}=={version(name)}" for name in _FOR_IMAGES]
    mlflow.pyfunc.save_model(
        path=str(path),
        loader_module="seer_scale.serving",
        data_path=str(folder),
        # Makes the model loadable where seer_scale is not installed.
        code_paths=[str(Path(seer_scale.__file__).parent)],
        signature=signature,
        input_example=_example(),
        pip_requirements=[f"mlflow=={mlflow.__version__}", *needed],
        metadata={key: config[key] for key in ("trunk", "width", "mean", "std", "versions")},
        mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
    )
    for cache in list(path.rglob("__pycache__")):
        shutil.rmtree(cache)


def _example() -> Any:
    """One JPEG in base64, as a request to a model's server holds it: a disc on a slope of grays."""
    rows, columns = np.mgrid[-1:1:96j, -1:1:96j]
    pixels = np.full((96, 96, 3), 128 + 100 * columns[..., None], np.uint8)
    pixels[rows**2 + columns**2 < 0.4] = (200, 60, 40)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=60)
    return np.array([base64.b64encode(file.getvalue()).decode()], dtype=object)
