"""The files in a tar shard: names, offsets and sizes, from the headers of all its archives.

Shards that were joined by `cat a.tar b.tar` hold several archives, each with its own end mark.
"""

from __future__ import annotations

import errno
import io
import os
import tarfile
from contextlib import suppress
from io import FileIO
from typing import NamedTuple

from seer_scale.data.image_kinds import LeftOut, has_image_suffix
from seer_scale.errors import DataError

KINDS = "an image folder, a tar shard, a pattern of shards or a manifest"

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2048 * _BLOCK
# First bytes of gzip, bzip2, xz and Zstandard.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")


class Member(NamedTuple):
    """A file in a shard; offset and size in bytes."""

    name: str
    offset: int
    size: int


def read_members(shown: str, shard: FileIO) -> tuple[list[Member], LeftOut]:
    """Reads the headers of a shard, and checks that the shard is whole.

    Hard links are members with the place of the member that they lead to. A member that has an
    image's name and is not a file is left out.

    tarfile takes a damaged header or the end of the file for the end of the archive, and does not
    check that a member's bytes exist. Both would lose images silently.

    Args:
        shown: name of the shard for sentences.
        shard: the open file.

    Raises:
        DataError: the file is not a tar, or is compressed, truncated or damaged.
        OSError: the file cannot be read.
    """
    members: list[Member] = []
    left_out = LeftOut()
    try:
        with io.BufferedReader(FileIO(os.dup(shard.fileno()))) as file:
            start: int | None = 0
            while start is not None:
                headers = _headers(shown, file, start)
                members += _files(headers, left_out)
                start = _next_archive(file, left_out)
    # ValueError, OverflowError: a header points before or far behind the file.
    except (tarfile.TarError, ValueError, OverflowError) as error:
        raise DataError(f"shard {shown} is damaged: {error}") from error
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise DataError(f"shard {shown} is damaged: a header points out of it") from error
    return members, left_out


def _headers(shown: str, file: io.BufferedReader[FileIO], start: int) -> list[tarfile.TarInfo]:
    """Reads the headers of the archive at `start`; leaves the file behind its end mark."""
    file.seek(start)
    compressed = file.read(6).startswith(_COMPRESSED)
    file.seek(start)
    headers: list[tarfile.TarInfo] = []
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar, suppress(tarfile.ReadError):
            headers.extend(tar)  # the checks below say more than tarfile's error
    except tarfile.TarError as error:
        raise DataError(
            f"shard {shown} is not a plain tar file ({error}): compressed shards have to be"
            " unpacked first"
            if compressed
            else f"data path {shown} is neither an image folder nor a tar shard ({error}):"
            f" give {KINDS}"
        ) from error
    length = os.fstat(file.fileno()).st_size
    for header in headers:
        if header.size < 0:
            raise DataError(f"shard {shown} is damaged: {header.name} has a negative size")
        if header.offset_data + header.size > length:
            raise DataError(
                f"shard {shown} is truncated in member {header.name}: it is {length} bytes"
                f" long, but that member ends at {header.offset_data + header.size}"
            )
    file.seek(max((_end(header) for header in headers), default=start))
    after = file.read(_BLOCK)
    if after != bytes(_BLOCK):
        last = f"after member {headers[-1].name}" if headers else "at its start"
        fault = "damaged" if len(after) == _BLOCK else "truncated"
        raise DataError(f"shard {shown} is {fault} {last}: the end mark of a tar file is missing")
    return headers


def _end(header: tarfile.TarInfo) -> int:
    """Returns the offset of the next header."""
    has_bytes = header.isreg() or header.type not in tarfile.SUPPORTED_TYPES
    stored = header.size if has_bytes else 0
    return header.offset_data + -(-stored // _BLOCK) * _BLOCK


def _next_archive(file: io.BufferedReader[FileIO], left_out: LeftOut) -> int | None:
    """Returns where a further archive begins behind an end mark and padding; None at the end."""
    start = file.tell()
    while chunk := file.read(_CHUNK):
        padding = len(chunk) - len(chunk.lstrip(b"\0"))
        if padding == len(chunk):
            start += len(chunk)
            continue
        start += padding // _BLOCK * _BLOCK
        file.seek(start)
        try:
            tarfile.TarInfo.frombuf(file.read(_BLOCK), tarfile.ENCODING, "surrogateescape")
        except tarfile.HeaderError:
            left_out.add("pieces behind the end of an archive that are no tar", [f"byte {start}"])
            return None
        return start
    return None


def _files(headers: list[tarfile.TarInfo], left_out: LeftOut) -> list[Member]:
    """Returns the files of one archive; a hard link leads to a file before it."""
    files: list[Member] = []
    places: dict[str, Member] = {}
    for header in headers:
        if header.isreg() and not header.issparse():
            member = Member(header.name, header.offset_data, header.size)
        elif header.islnk() and header.linkname in places:
            member = places[header.linkname]._replace(name=header.name)
        else:
            if not header.isdir() and has_image_suffix(header.name):
                left_out.add(_reason(header), [header.name])
            continue
        places[header.name] = member
        files.append(member)
    return files


def _reason(header: tarfile.TarInfo) -> str:
    if header.issparse():
        return "sparse files"
    if header.islnk():
        return "hard links to members that are not in the shard"
    return "symbolic links" if header.issym() else "members that are no files"
