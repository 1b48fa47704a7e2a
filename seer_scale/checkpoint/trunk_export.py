"""The trunk beside a checkpoint's slices, added by rank 0 once the checkpoint exists.

Resuming needs no trunk, and at ten billion parameters writing one takes minutes. Therefore nothing
that a run needs waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from seer_scale.checkpoint.manifest import write_manifest
from seer_scale.checkpoint.reader import CheckpointReader, lazily
from seer_scale.checkpoint.staging import Staging
from seer_scale.errors import CheckpointError
from seer_scale.serving import write_trunk
from seer_scale.storage.atomic import replaced_folder
from seer_scale.storage.tensor_file import Stamp, from_tensors


def add_trunk(
    folder: Path,
    content: Mapping[str, Any],
    files: Mapping[str, Stamp],
    staging: Staging,
    limit_s: Callable[[], float],
) -> None:
    """Writes `folder/trunk` and replaces the manifest by one that lists it too.

    Args:
        folder: folder of a checkpoint that has its name.
        content: JSON values of its manifest.
        files: stamps of the files that the manifest lists.
        staging: tensors of rank 0, which need not be read from the files.
        limit_s: seconds that this may take; asked again and again, as it may get less.

    Raises:
        CheckpointError: if it takes longer; the folder is as it was.
        OSError: if the disk does not take it; the same.
    """
    began = time.monotonic()
    kinds, read = lazily(CheckpointReader(folder, {**content, "files": files}), "trunk.")
    held, from_files = staging.kinds(), from_tensors(kinds, read)

    def fill(name: str, start: int, target: NDArray[np.uint8]) -> None:
        """Reads from memory if this rank has the whole tensor, else from the new files."""
        if time.monotonic() - began > limit_s():
            raise CheckpointError("the run was about to end")
        key = f"weight/trunk.{name}"
        if key in held and held[key].numel == kinds[name].numel:
            staging.fill(key, start, target)
        else:
            from_files(name, start, target)

    with replaced_folder(folder / "trunk") as fresh:
        about = {"step": content["step"], "pretraining": pretraining_of(content)}
        written = write_trunk(fresh, kinds, fill, trunk=content["trunk"], **about)
    stamps = {f"trunk/{name}": stamp for name, stamp in written.items()}
    write_manifest(folder, content, {**files, **stamps})


def pretraining_of(content: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about the run that made a trunk, for its card; only those that the manifest states.

    Args:
        content: JSON values of a checkpoint's manifest.
    """
    config: Mapping[str, Any] = content.get("config", {})
    data: Mapping[str, Any] = config.get("data", {})
    stated = {
        "recipe": config.get("recipe"),
        "objective": config.get("objective", {}).get("name"),
        "steps": content["step"],
        "images": content.get("state", {}).get("samples_seen"),
        "crop_sizes": data.get("crop_sizes"),
        "crop_counts": data.get("crop_counts"),
    }
    return {key: value for key, value in stated.items() if value is not None}
