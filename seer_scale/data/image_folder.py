"""Images in a folder tree: what the tree holds, and the source that reads it."""

from __future__ import annotations

import heapq
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from seer_scale.data.image_kinds import (
    FOREIGN,
    HEAD,
    HIDDEN,
    LeftOut,
    has_image_suffix,
    is_foreign,
    is_image,
    printable,
)

_ARCHIVES = (".zip", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
_SEEN = "folders that are listed already, under another name or above (links, mounts)"
_PACKED = "archives that are not read: unpack them, or make plain tars of them"
_OWNER = ".owner"  # the marks of running commands, see `storage.ownership`
_NO_FILES = "pipes, sockets and devices"


class Listing(NamedTuple):
    """Content of a folder: paths of images and tar shards relative to it, sorted."""

    images: list[str]
    shards: list[str]
    left_out: LeftOut


class ImageFolder:
    """Images below a folder, sorted by path; the label is the first folder below the root.

    Attributes:
        left_out: what lies below the folder and is not used.
    """

    def __init__(self, root: Path, files: list[str], left_out: LeftOut | None = None) -> None:
        self._root = root
        self._files = files  # relative to root
        self.left_out = left_out or LeftOut()
        self.shard_sizes = np.array([len(files)], dtype=np.int64)
        names = "\0".join(files).encode("utf-8", "surrogateescape")
        self.version = xxhash.xxh3_64_hexdigest(names)

    def __len__(self) -> int:
        return len(self._files)

    def read(self, index: int) -> bytes:
        """Reads the bytes of a file."""
        return self.path(index).read_bytes()

    def path(self, index: int) -> Path:
        """Returns the path of a file, to open it."""
        return self._root / self._files[index]

    def name_below(self, index: int) -> str:
        """Returns the path of a file below the folder, fit to print."""
        return printable(self._files[index])

    def name(self, index: int) -> str:
        """Returns the path of a file, fit to print."""
        return printable(str(self.path(index)))

    def label(self, index: int) -> str | None:
        """Returns the first folder on the way to the file; None for a file directly in the root."""
        first, slash, _ = self._files[index].partition(os.sep)
        return printable(first) if slash else None


def list_folder(root: str) -> Listing:
    """Lists the images and tar shards below a folder; follows links to folders.

    Every folder is listed once, even if links or mounts lead to it again; links are followed after
    all real folders, so that the result does not depend on the file system's order. Pipes, sockets
    and devices are left out: reading one may wait for ever. Links that lead nowhere are listed, so
    that they are counted as images that cannot be read.

    Raises:
        OSError: a folder cannot be read.
    """
    found = Listing([], [], LeftOut())
    below = len(os.path.join(root, ""))
    for entry in _walk(root, found.left_out):
        path = entry.path[below:]
        if _is_irregular(entry):
            if has_image_suffix(entry.name):
                found.left_out.add(_NO_FILES, [path])
        elif os.path.splitext(entry.name)[1].lower() == ".tar":
            found.shards.append(path)
        elif is_image(entry.name, lambda path=entry.path: _head(path)):  # type: ignore[misc]
            found.images.append(path)
        elif is_foreign(entry.name):
            found.left_out.add(FOREIGN, [path])
        elif entry.name.lower().endswith(_ARCHIVES) or ".tar." in entry.name.lower():
            found.left_out.add(_PACKED, [path])
    found.images.sort()
    found.shards.sort()
    return found


def _walk(root: str, left_out: LeftOut) -> Iterator[os.DirEntry[str]]:
    """Yields everything below `root` that is neither a folder nor hidden."""
    # A link to a folder above the root would lead to the root again, and out of it.
    above = os.path.dirname(os.path.realpath(root))
    seen = {_identity(os.stat(above))}
    while above != (above := os.path.dirname(above)):
        seen.add(_identity(os.stat(above)))
    seen.discard(_identity(os.stat(root)))  # the root of the file system is above itself
    folders, links = [root], list[str]()
    while folders or links:
        folder = folders.pop() if folders else heapq.heappop(links)
        identity = _identity(os.stat(folder))
        if identity in seen:
            left_out.add(_SEEN, [os.path.relpath(folder, root)])
            continue
        seen.add(identity)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                is_folder = _leads_to_folder(entry)
                if entry.name.startswith("."):
                    mark = entry.name.endswith(_OWNER)
                    if (is_folder and not mark) or has_image_suffix(entry.name):
                        left_out.add(HIDDEN, [os.path.relpath(entry.path, root)])
                elif is_folder:
                    if entry.is_symlink():
                        heapq.heappush(links, entry.path)
                    else:
                        folders.append(entry.path)
                else:
                    yield entry


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _is_irregular(entry: os.DirEntry[str]) -> bool:
    """Returns whether an entry exists and is not a regular file."""
    try:
        return not entry.is_file() and not stat.S_ISREG(os.stat(entry.path).st_mode)
    except OSError:
        return False


def _head(path: str) -> bytes:
    with suppress(OSError), open(path, "rb") as file:
        return file.read(HEAD)
    return b""
