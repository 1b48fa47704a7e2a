"""Folders of checkpoints, and the manifest: the small JSON file that lists what one holds.

The manifest lists every file with its length and checksum (XXH3), and has a checksum of its own, so
that damage is found before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from seer_scale.errors import CheckpointError
from seer_scale.storage.atomic import replaced_file
from seer_scale.storage.tensor_file import Stamp

FORMAT = 3
MANIFEST = "manifest.json"
FOLDER = re.compile(r"step_(\d{8})")
_LARGEST = 64 << 20  # bytes; what is larger is not a manifest


class OtherFormatError(CheckpointError):
    """A whole checkpoint in a format that this version does not read."""


def checkpoint_folder(root: Path, step: int) -> Path:
    """Folder of the checkpoint of `step`."""
    return root / f"step_{step:08d}"


def step_of(folder: Path) -> int | None:
    """Step in a folder's name; None for any other name."""
    found = FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else None


def list_checkpoints(root: Path) -> list[Path]:
    """Lists whole checkpoints under `root`, oldest first, without killed saves."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if step_of(path) is not None)


def rank_file(folder: Path, rank: int) -> Path:
    """File of the tensors that rank `rank` wrote."""
    return folder / f"rank_{rank:05d}.safetensors"


def write_manifest(folder: Path, content: Mapping[str, Any], files: Mapping[str, Stamp]) -> None:
    """Writes the manifest in place of an older one; a folder without one is not a checkpoint.

    Args:
        folder: folder of the checkpoint.
        content: JSON values; step and world_size among them.
        files: length and checksum of every other file, by its path within the folder.
    """
    whole = {"format": FORMAT, **content, "files": {k: s._asdict() for k, s in files.items()}}
    # What JSON makes of it is what is signed: tuples are lists by then.
    whole = json.loads(json.dumps(whole))
    text = json.dumps({**whole, "checksum": _checksum(whole)}, indent=1) + "\n"
    with replaced_file(folder / MANIFEST) as fresh:
        fresh.write_text(text)


def read_manifest(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Reads a checkpoint's manifest and compares the lengths of files; `files` holds stamps.

    Args:
        folder: folder of the checkpoint.
        part: which share of the files is looked at, of `parts` equal ones.
        parts: number of shares.

    Raises:
        OtherFormatError: if it is of another format.
        CheckpointError: if it is missing or damaged, if the folder was given
            another step's name, or if a file is missing or has another length.
    """
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("too large")
        manifest: dict[str, Any] = json.loads(path.read_text())
        form = int(manifest["format"])
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder} is not a whole checkpoint: it has no {MANIFEST}; resume from another one"
        ) from None
    # RecursionError: of a damaged file of brackets.
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)})") from None
    if form > FORMAT:
        raise OtherFormatError(
            f"{folder} has format {form} and this version reads up to {FORMAT}: update seer_scale"
        )
    if form < FORMAT:
        raise OtherFormatError(
            f"{folder} has format {form}, of a version before the first release; this one reads "
            f"{FORMAT} only"
        )
    try:
        written = manifest.pop("checksum")
        if written != _checksum(manifest):
            raise ValueError("its contents do not have the checksum that it states")
        step, world_size = int(manifest["step"]), int(manifest["world_size"])
        files = {str(name): Stamp(**fields) for name, fields in manifest["files"].items()}
        if world_size < 1:
            raise ValueError(f"it is of {world_size} ranks")
        if outside := [name for name in files if not _is_inside(name)]:
            raise ValueError(f"{outside[0]!r:.60} is not a file of the checkpoint")
        possible = range(min(world_size, len(files) + 1))
        missing = [r for r in possible if rank_file(folder, r).name not in files]
        if missing:
            raise ValueError(f"it has no {rank_file(folder, missing[0]).name}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({one_line(error)})") from None
    if step_of(folder) not in (None, step):
        raise CheckpointError(
            f"{folder} holds step {step} under the name of another: rename it to "
            f"{checkpoint_folder(folder.parent, step).name}"
        )
    for name, expected in list(files.items())[part::parts]:
        file = folder / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != expected.bytes:
            state = (
                "missing" if actual is None else f"{actual} bytes long instead of {expected.bytes}"
            )
            raise CheckpointError(
                f"{folder} is half written or damaged: {name} is {state}; resume from "
                "another checkpoint"
            )
    return {**manifest, "files": files}


def one_line(error: BaseException) -> str:
    """Message of an exception, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    return "\0" not in name and not path.is_absolute() and ".." not in path.parts


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
