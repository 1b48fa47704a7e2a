"""Where encoded images come from: a folder tree, or WebDataset tar shards read at random.

A source is a numbered list of encoded images. It is indexed once, when it is opened, so that
whatever is wrong with a path is one sentence before training starts.
"""

from __future__ import annotations

import glob
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from braceexpand import braceexpand

from seer_scale.data.tars import TarShards
from seer_scale.errors import DataError

_KINDS = "an image folder, a tar shard or a pattern of shards"

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
)

# First bytes of gzip, bzip2, xz and Zstandard.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")

Label = int | str


class Source(Protocol):
    """A numbered list of encoded images."""

    def __len__(self) -> int:
        """How many images there are."""

    def read(self, index: int) -> bytes:
        """The encoded image; OSError where it cannot be read."""

    def name(self, index: int) -> str:
        """What a person finds the image by; touches no file."""

    def label(self, index: int) -> Label | None:
        """The class of the image, where the layout tells one."""


class ImageFolder:
    """Images below a folder, in the order of their paths; the label is the folder they lie in."""

    def __init__(self, root: Path, files: list[str]) -> None:
        self._root = root
        self._files = files  # relative to root

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        """The file's bytes."""
        return (self._root / self._files[index]).read_bytes()

    def name(self, index: int) -> str:
        """The file's path."""
        return str(self._root / self._files[index])

    def label(self, index: int) -> str | None:
        """Name of the folder the file lies in, None for files directly in the root."""
        return os.path.basename(os.path.dirname(self._files[index])) or None


def open_source(path: str | os.PathLike[str]) -> Source:
    """Opens a folder of images, a tar shard, a folder of shards, or a pattern of shards.

    Args:
        path: a pattern may use braces (`shard-{000000..000009}.tar`) and wildcards.

    Raises:
        DataError: the path is missing, empty, unreadable or holds no images, or a shard is no
            tar, truncated or without images.
    """
    text = os.fspath(path)
    if not text:
        raise DataError(f"data.path is empty: give {_KINDS}")
    try:
        if os.path.isdir(text):
            return _open_folder(text)
        if not os.path.lexists(text) and any(sign in text for sign in "*?[{"):
            return _open_shards(_expand(text))
        return _open_shards([text])
    except FileNotFoundError as error:
        raise DataError(
            f"data path {error.filename or text} does not exist: give {_KINDS}"
        ) from error
    except PermissionError as error:
        raise DataError(
            f"data path {error.filename or text} cannot be read: permission denied to this user"
        ) from error
    except OSError as error:
        raise DataError(
            f"data path {error.filename or text} cannot be read ({error.strerror or error}):"
            f" give {_KINDS}"
        ) from error


def _open_folder(root: str) -> Source:
    images: list[str] = []
    shards: list[str] = []
    for file in _walk(root):
        suffix = os.path.splitext(file)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(os.path.relpath(file, root))
        elif suffix == ".tar":
            shards.append(file)
    if images and shards:
        raise DataError(
            f"data path {root} holds both images ({images[0]}) and tar shards ({shards[0]}):"
            " point to a folder with one kind, or to a pattern of shards"
        )
    if shards:
        return _open_shards(sorted(shards))
    if not images:
        raise DataError(
            f"data path {root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            " and no .tar shards"
        )
    return ImageFolder(Path(root), sorted(images))


def _walk(root: str) -> Iterator[str]:
    """Files below `root`, through links to folders, without hidden files and folders."""

    def fail(error: OSError) -> None:
        raise error

    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (os.path.join(folder, name) for name in files if not name.startswith("."))


def _expand(pattern: str) -> list[str]:
    try:
        candidates = list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"data path {pattern} has a brace that is not closed") from error
    shards: list[str] = []
    for candidate in candidates:
        found = sorted(glob.glob(candidate, recursive=True))
        if not found:
            raise DataError(
                f"data path {pattern} matches nothing"
                if len(candidates) == 1
                else f"data path {pattern} names {candidate}, which does not exist"
            )
        shards.extend(found)
    return shards


def _open_shards(paths: list[str]) -> TarShards:
    for path in paths:
        with open(path, "rb") as file:
            compressed = file.read(6).startswith(_COMPRESSED)
            file.seek(0)
            try:
                tarfile.open(fileobj=file, mode="r:").close()
            except tarfile.TarError as error:
                if not compressed:  # what to do with those, TarShards says
                    raise DataError(
                        f"data path {path} is neither an image folder nor a tar shard ({error}):"
                        f" give {_KINDS}"
                    ) from error
    return TarShards(paths, IMAGE_SUFFIXES)
