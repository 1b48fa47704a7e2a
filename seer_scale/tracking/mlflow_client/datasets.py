"""Collections of images as MLflow's datasets."""

from __future__ import annotations

import json
from pathlib import PurePosixPath
from urllib.parse import urlsplit

from mlflow.entities import Dataset, DatasetInput, InputTag

_CONTEXT = "mlflow.data.context"  # what MLflow's pages show beside a dataset
_LONGEST_DIGEST = 36  # characters of a column of MLflow's database


def dataset_input(path: str, digest: str, images: int, used_for: str) -> DatasetInput:
    """Describes a collection; `mlflow.data.get_source` finds it again.

    Args:
        path: local path or address, without secrets.
        digest: version of the collection.
        images: number of its images.
        used_for: `training` or `validation`.
    """
    scheme = urlsplit(path).scheme if "://" in path else ""
    source = {"url": path} if scheme in ("http", "https") else {"uri": path}
    kind = "http" if scheme in ("http", "https") else scheme or "local"
    entity = Dataset(
        name=PurePosixPath(path).name or path,
        digest=digest[:_LONGEST_DIGEST],
        source_type=kind,
        source=json.dumps(source),
        profile=json.dumps({"images": images}),
    )
    return DatasetInput(entity, [InputTag(_CONTEXT, used_for)])
