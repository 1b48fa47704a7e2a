"""An exported trunk as the folder that MLflow keeps of a model."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
from mlflow.models import Model, ModelSignature
from mlflow.types import Schema, TensorSpec

import seer_scale

_NOT_ON_INDEX = ("python", "seer_scale")


def pack(path: Path, folder: Path, config: Mapping[str, Any], run_id: str, model_id: str) -> None:
    """Writes an MLflow model folder: the exported trunk as data, this package as its code."""
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, 3, -1, -1))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, config["width"]))]),
    )
    versions = config["versions"].items()
    needed = [f"{name}=={number}" for name, number in versions if name not in _NOT_ON_INDEX]
    mlflow.pyfunc.save_model(
        path=str(path),
        loader_module="seer_scale.serving",
        data_path=str(folder),
        # Makes the model loadable where seer_scale is not installed.
        code_paths=[str(Path(seer_scale.__file__).parent)],
        signature=signature,
        pip_requirements=[f"mlflow=={mlflow.__version__}", *needed],
        metadata={key: config[key] for key in ("trunk", "width", "mean", "std", "versions")},
        mlflow_model=Model(run_id=run_id, model_id=model_id, model_uuid=model_id),
    )
    for cache in list(path.rglob("__pycache__")):
        shutil.rmtree(cache)
