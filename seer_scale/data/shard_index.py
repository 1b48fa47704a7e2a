"""Where the images of one tar shard lie: made by one walk over its headers, kept as a small file.

The members of a sample share a key: `000123.jpg`, `000123.json`, `000123.cls`.
"""

from __future__ import annotations

import errno
import io
import os
import tarfile
import threading
import zipfile
import zlib
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import xxhash
from numpy.typing import NDArray

from seer_scale.data.addresses import redact
from seer_scale.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
)
KINDS = "an image folder, a tar shard, a pattern of shards or a manifest"

_BLOCK = tarfile.BLOCKSIZE
# First bytes of gzip, bzip2, xz and Zstandard.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Identity(NamedTuple):
    """What an index belongs to; an index of anything else is made anew.

    Attributes:
        url: path or address of the shard.
        size: in bytes.
        tag: time of the last change or entity tag.
    """

    url: str
    size: int
    tag: str


class ShardIndex(NamedTuple):
    """Arrays, not lists of objects: this travels to every loader process.

    Attributes:
        images: `[N, 2]` int64, offset and size of every image in bytes.
        labels: `[N, 2]` int64, the same of its `.cls` member; size 0 where there is none.
        names: `[bytes]` uint8, the members' names one after the other.
        name_ends: `[N]` int64, where each name ends in `names`.
    """

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]

    def name(self, position: int) -> str:
        """Member name of an image."""
        start = int(self.name_ends[position - 1]) if position else 0
        return os.fsdecode(self.names[start : int(self.name_ends[position])].tobytes())

    @classmethod
    def build(cls, shard: FileIO, url: str) -> Self:
        """Walks over the headers of an open shard.

        Raises:
            DataError: it is no tar, compressed, truncated, damaged, or without images.
        """
        shown = redact(url)
        found = _find_images(shown, _members(shown, shard))
        names = [os.fsencode(image.name) for image, _ in found]
        return cls(
            np.array([(image.offset_data, image.size) for image, _ in found], dtype=np.int64),
            np.array(
                [(label.offset_data, label.size) if label else (0, 0) for _, label in found],
                dtype=np.int64,
            ),
            np.frombuffer(b"".join(names), dtype=np.uint8),
            np.cumsum([len(name) for name in names], dtype=np.int64),
        )


def index_path(folder: Path, identity: Identity) -> Path:
    """Where the index of a shard is kept below `folder`."""
    return folder / f"{_digest(identity)}.npz"


def load_index(folder: Path, identity: Identity) -> ShardIndex | None:
    """The index that was saved of a shard; None where there is none, or not a whole one."""
    path = index_path(folder, identity)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            index = ShardIndex(*(arrays[name] for name in ShardIndex._fields))
            belongs = arrays["identity"].tobytes() == _digest(identity).encode()
        if belongs and _is_sound(index, identity.size):
            os.utime(path)  # the cache deletes what was not used for the longest time
            return index
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # the index only saves time
    return None


def save_index(folder: Path, identity: Identity, index: ShardIndex) -> None:
    """Keeps an index for `load_index`; a disk that takes none costs time later, nothing more."""
    path = index_path(folder, identity)
    temporary = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.tmp")
    own = np.frombuffer(_digest(identity).encode(), dtype=np.uint8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, identity=own, **index._asdict())
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _digest(identity: Identity) -> str:
    """Not the address itself, which may carry a signature."""
    return xxhash.xxh3_128_hexdigest(repr(tuple(identity)).encode())


def _is_sound(index: ShardIndex, size: int) -> bool:
    """Whether every array has its type and shape, and nothing points outside of the shard."""
    count = len(index.images)
    pairs = (index.images, index.labels)
    return (
        count > 0
        and all(pair.dtype == np.int64 and pair.shape == (count, 2) for pair in pairs)
        and all(int(pair.min()) >= 0 and int(pair.sum(axis=1).max()) <= size for pair in pairs)
        and index.names.dtype == np.uint8
        and index.names.ndim == 1
        and index.name_ends.dtype == np.int64
        and index.name_ends.shape == (count,)
        and bool((np.diff(index.name_ends, prepend=0) >= 0).all())
        and int(index.name_ends[-1]) == len(index.names)
    )


def _members(shown: str, shard: FileIO) -> list[tarfile.TarInfo]:
    """All members of a shard that is whole.

    tarfile takes a damaged header or the end of the file for the end of the archive, and does not
    look whether a member's bytes are there: both would lose images in silence.
    """
    members: list[tarfile.TarInfo] = []
    try:
        with io.BufferedReader(FileIO(os.dup(shard.fileno()))) as file:
            file.seek(0)
            compressed = file.read(6).startswith(_COMPRESSED)
            file.seek(0)
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar, suppress(tarfile.ReadError):
                    members.extend(tar)  # what came before the fault tells more than tarfile does
            except tarfile.TarError as error:
                raise DataError(
                    f"shard {shown} is not a plain tar file ({error}): compressed shards have to be"
                    " unpacked first"
                    if compressed
                    else f"data path {shown} is neither an image folder nor a tar shard ({error}):"
                    f" give {KINDS}"
                ) from error
            length = os.fstat(shard.fileno()).st_size
            for member in members:
                if member.size < 0:
                    raise DataError(f"shard {shown} is damaged: {member.name} has a negative size")
                if member.offset_data + member.size > length:
                    raise DataError(
                        f"shard {shown} is truncated in member {member.name}: it is {length} bytes"
                        f" long, but that member ends at {member.offset_data + member.size}"
                    )
            file.seek(max((_end(member) for member in members), default=0))
            after = file.read(_BLOCK)
    # ValueError, OverflowError: of a header that sends tarfile before or far behind the file.
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"shard {shown} is damaged: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise DataError(f"shard {shown} is damaged: a header points out of it") from error
    if after != bytes(_BLOCK):
        last = f"after member {members[-1].name}" if members else "at its start"
        fault = "damaged" if len(after) == _BLOCK else "truncated"
        raise DataError(f"shard {shown} is {fault} {last}: the end mark of a tar file is missing")
    return members


def _end(member: tarfile.TarInfo) -> int:
    """Where the header after `member` begins."""
    stored = member.size if member.isreg() else 0
    return member.offset_data + -(-stored // _BLOCK) * _BLOCK


def _find_images(
    shown: str, members: list[tarfile.TarInfo]
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
        image = next((fields[ending] for ending in fields if ending in IMAGE_SUFFIXES), None)
        if image is not None:
            found.append((image, fields.get(".cls")))
    if not found:
        raise DataError(f"shard {shown} holds no images among its {len(members)} members")
    return found
