"""WebDataset tar shards, as img2dataset writes them, with random access.

The members of a sample share a key: `000123.jpg`, `000123.json`, `000123.cls`. Opening walks over
the headers once; afterwards an image is one positioned read, from any process or thread.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from io import FileIO
from typing import Any

import numpy as np

from seer_scale.errors import DataError

_BLOCK = tarfile.BLOCKSIZE
_OPEN_SHARDS = 128


class TarShards:
    """The images of several shards, shard by shard in the order they have there.

    Args:
        paths: shards in the order in which they are numbered.
        suffixes: lower-case endings, with dot, of the members that are images.

    Raises:
        DataError: a shard that is unreadable, no tar, truncated, or without images.
    """

    def __init__(self, paths: Sequence[str], suffixes: Collection[str]) -> None:
        self._paths = list(paths)
        images: list[tuple[int, int, int]] = []  # shard, offset, size
        labels: list[tuple[int, int]] = []  # offset, size; size 0 where there is none
        names: list[bytes] = []
        for shard, path in enumerate(paths):
            found = _find_images(path, _members(path), suffixes)
            for image, label in found:
                images.append((shard, image.offset_data, image.size))
                labels.append((label.offset_data, label.size) if label else (0, 0))
                names.append(os.fsencode(image.name))
        # Arrays, not lists of objects: this travels to every loader process.
        self._images = np.array(images, dtype=np.int64)
        self._labels = np.array(labels, dtype=np.int64)
        self._names = np.array(names, dtype=np.bytes_)
        self._files: dict[int, FileIO] = {}

    def __len__(self) -> int:
        return len(self._images)

    def read(self, index: int) -> bytes:
        """The encoded image."""
        shard, offset, size = self._images[index].tolist()
        return os.pread(self._file(shard).fileno(), size, offset)

    def name(self, index: int) -> str:
        """Shard and member, as `shard.tar/000123.jpg`."""
        return f"{self._paths[self._images[index, 0]]}/{os.fsdecode(self._names[index])}"

    def label(self, index: int) -> int | str | None:
        """Content of the sample's `.cls` member, None where it has none."""
        offset, size = self._labels[index].tolist()
        if not size:
            return None
        shard = int(self._images[index, 0])
        text = os.pread(self._file(shard).fileno(), size, offset).decode().strip()
        return int(text) if text.isdecimal() else text

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def _file(self, shard: int) -> FileIO:
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= _OPEN_SHARDS:  # the operating system allows about a thousand
                self._files.pop(next(iter(self._files)))
            file = self._files[shard] = FileIO(self._paths[shard])
        return file


def _members(path: str) -> list[tarfile.TarInfo]:
    """All members of a shard that is whole.

    tarfile takes a damaged header or the end of the file for the end of the archive, and does not
    look whether a member's bytes are there: both would lose images in silence.
    """
    try:
        members: list[tarfile.TarInfo] = []
        with tarfile.open(path, "r:") as tar, suppress(tarfile.ReadError):
            members.extend(tar)  # what came before the fault tells more than tarfile does
        length = os.path.getsize(path)
        end = max((_end(member) for member in members), default=0)
        with open(path, "rb") as file:
            file.seek(end)
            after = file.read(_BLOCK)
    except tarfile.TarError as error:
        raise DataError(
            f"shard {path} is not a plain tar file ({error}): compressed shards have to be"
            " unpacked first"
        ) from error
    except PermissionError as error:
        raise DataError(f"shard {path} cannot be read: permission denied to this user") from error
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror or error}") from error
    for member in members:
        if member.offset_data + member.size > length:
            raise DataError(
                f"shard {path} is truncated in member {member.name}: it is {length} bytes long,"
                f" but that member ends at {member.offset_data + member.size}"
            )
    if after != bytes(_BLOCK):
        last = f"after member {members[-1].name}" if members else "at its start"
        fault = "damaged" if len(after) == _BLOCK else "truncated"
        raise DataError(f"shard {path} is {fault} {last}: the end mark of a tar file is missing")
    return members


def _end(member: tarfile.TarInfo) -> int:
    """Where the header after `member` begins."""
    stored = member.size if member.isreg() else 0
    return member.offset_data + -(-stored // _BLOCK) * _BLOCK


def _find_images(
    path: str, members: list[tarfile.TarInfo], suffixes: Collection[str]
) -> list[tuple[tarfile.TarInfo, tarfile.TarInfo | None]]:
    """Image and label member of every sample that has an image.

    As WebDataset does it, the key ends at the first dot of the base name, so that
    `0001.seg.png` is no image of its own beside `0001.jpg`.
    """
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        if member.isreg() and not member.issparse():
            folder, base = os.path.split(member.name)
            stem, dot, ending = base.partition(".")
            if stem:
                fields = samples.setdefault(os.path.join(folder, stem), {})
                fields.setdefault((dot + ending).lower(), member)
    found = []
    for fields in samples.values():
        image = next((fields[ending] for ending in fields if ending in suffixes), None)
        if image is not None:
            found.append((image, fields.get(".cls")))
    if not found:
        raise DataError(f"shard {path} holds no images among its {len(members)} members")
    return found
