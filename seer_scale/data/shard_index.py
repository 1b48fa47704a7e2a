"""The index of one tar shard: offsets and sizes of its images, kept as a small file.

The index is built in one pass over the headers. It is kept in the cache of a node, or listed in a
manifest: then no process walks through the headers, and images can be read from a server one by
one. A listed index knows nothing of the shard's identity; each image is compared with its header.
"""

from __future__ import annotations

import io
import os
import secrets
import tarfile
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
from seer_scale.data.image_kinds import HEAD, LeftOut, printable
from seer_scale.data.tar_members import read_members
from seer_scale.data.tar_samples import find_samples
from seer_scale.errors import DataError

BLOCK = tarfile.BLOCKSIZE  # bytes of a header


class Identity(NamedTuple):
    """Identity of a shard; a kept index is used only if its identity is the same.

    Attributes:
        url: path or address of the shard.
        size: size of the shard in bytes.
        tag: time of the last change, or entity tag.
    """

    url: str
    size: int
    tag: str


class ShardIndex(NamedTuple):
    """The places of N images in a shard, as arrays, which are cheap to send to loader processes.

    Attributes:
        images: int64 [N, 2], offset and size of each image in bytes.
        labels: int64 [N, 2], offset and size of each image's `.cls` member; size 0 if it has none.
        names: uint8 [bytes], the names of the members in one row.
        name_ends: int64 [N], the end of each name in `names`.
        left_out: uint8 [bytes], the members that are not used, as `LeftOut` writes them.
    """

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    left_out: NDArray[np.uint8]

    def name(self, position: int) -> str:
        """Returns the member name of the image at `position`."""
        start = int(self.name_ends[position - 1]) if position else 0
        return printable(os.fsdecode(self.names[start : int(self.name_ends[position])].tobytes()))

    @classmethod
    def build(cls, shard: FileIO, url: str) -> Self:
        """Builds the index from the headers of an open shard.

        Raises:
            DataError: the file is not a tar, or is compressed, truncated, damaged or without
                images.
        """
        shown = redact(url)
        members, left_out = read_members(shown, shard)
        found = find_samples(
            members, lambda member: _head(shard, member.offset, member.size), left_out
        )
        if not found:
            raise DataError(
                "; ".join(
                    [
                        f"shard {shown} holds no images among its {len(members)} members",
                        *left_out.lines(),
                    ]
                )
            )
        names = [os.fsencode(image.name) for image, _ in found]
        return cls(
            np.array([(image.offset, image.size) for image, _ in found], dtype=np.int64),
            np.array(
                [(label.offset, label.size) if label else (0, 0) for _, label in found],
                dtype=np.int64,
            ),
            np.frombuffer(b"".join(names), dtype=np.uint8),
            np.cumsum([len(name) for name in names], dtype=np.int64),
            np.frombuffer(left_out.to_json(), dtype=np.uint8),
        )


def index_path(folder: Path, identity: Identity) -> Path:
    """Returns the file of a shard's index below `folder`."""
    return folder / f"{_digest(identity)}.npz"


def load_index(folder: Path, identity: Identity) -> ShardIndex | None:
    """Loads the saved index of a shard; None if it is missing or damaged."""
    path = index_path(folder, identity)
    try:
        data = path.read_bytes()
        os.utime(path)  # the cache deletes the least recently used files
    except OSError:
        return None
    return unpack_index(data, identity.size, _digest(identity))


def pack_index(identity: Identity, index: ShardIndex) -> bytes:
    """Packs an index into the bytes of a file."""
    own = np.frombuffer(_digest(identity).encode(), dtype=np.uint8)
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, identity=own, **index._asdict())
    return file.getvalue()


def unpack_index(data: bytes, size: int, digest: str | None = None) -> ShardIndex | None:
    """Unpacks the bytes of a kept index; None if they are damaged.

    Args:
        data: content of the file.
        size: size of the shard in bytes.
        digest: digest of the identity that the index has to have; None for any.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            index = ShardIndex(*(arrays[name] for name in ShardIndex._fields))
            belongs = digest is None or arrays["identity"].tobytes() == digest.encode()
        LeftOut.from_json(index.left_out.tobytes())
        if belongs and _is_sound(index, size):
            return index
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        pass  # without a saved index, a new one is built
    return None


def is_header_of(block: bytes, size: int) -> bool:
    """Returns whether a block of a tar is the header of a file of `size` bytes."""
    try:
        header = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
    except tarfile.HeaderError:
        return False
    return header.isreg() and header.size == size


def can_be_listed(shard: FileIO, index: ShardIndex) -> bool:
    """Returns whether every image of an open shard has its header in front of it.

    A header that states the size elsewhere (pax) is none to compare an image with.
    """
    places = index.images.tolist()
    return all(
        is_header_of(os.pread(shard.fileno(), BLOCK, offset - BLOCK), size)
        for offset, size in places
    )


def save_index(folder: Path, identity: Identity, index: ShardIndex) -> None:
    """Saves an index for `load_index`; if the disk refuses, the index is built again later."""
    path = index_path(folder, identity)
    # Process ids repeat in containers that share the folder.
    temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(pack_index(identity, index))
        temporary.replace(path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def _digest(identity: Identity) -> str:
    """Returns a digest of the identity; the address itself may contain a signature."""
    return xxhash.xxh3_128_hexdigest(repr(tuple(identity)).encode())


def _is_sound(index: ShardIndex, size: int) -> bool:
    """Returns whether all arrays have the right type and shape and point inside the shard."""
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


def _head(shard: FileIO, offset: int, size: int) -> bytes:
    """Reads the first bytes of a member."""
    return os.pread(shard.fileno(), min(size, HEAD), offset)
