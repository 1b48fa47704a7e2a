"""Where encoded images come from: a folder tree, or WebDataset tar shards read at random.

A source is a numbered list of encoded images. What is wrong with a path is one sentence, when it
is opened, before training starts.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import xxhash
from braceexpand import braceexpand
from numpy.typing import NDArray

from seer_scale.data.addresses import check_address, is_remote, protocol_of, redact
from seer_scale.data.cache import Cache, default_cache
from seer_scale.data.remote import Retry, as_data_error, list_files, stat
from seer_scale.data.shard_index import IMAGE_SUFFIXES, KINDS
from seer_scale.data.shard_manifest import Shard, is_manifest, read_shards
from seer_scale.data.tars import index_shards, open_shards
from seer_scale.errors import DataError

Label = int | str


class Source(Protocol):
    """A numbered list of encoded images; picklable, and read from several threads at once."""

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """`[S]`, images of each shard, in the order of numbering; a folder is one shard."""

    @property
    def version(self) -> str:
        """16 hex digits that change with the names and counts of what the collection holds."""

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
        self.shard_sizes = np.array([len(files)], dtype=np.int64)
        names = "\0".join(files).encode("utf-8", "surrogateescape")
        self.version = xxhash.xxh3_64_hexdigest(names)

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


def open_source(path: str | os.PathLike[str], cache: Cache | None = None) -> Source:
    """Opens a folder of images, a tar shard, a folder or pattern of shards, or a manifest.

    Args:
        path: local, or an address that fsspec knows. A pattern may use braces
            (`shard-{000000..000009}.tar`) and, where files can be listed, wildcards. A manifest
            ends in `.jsonl` or `.parquet`.
        cache: for copies of remote shards and for indexes. Without one, remote shards go to a
            default folder, and local shards are indexed each time.

    Raises:
        DataError: the path is missing, empty, unreadable or holds no images, its server or the
            credentials fail, or a shard is no tar, truncated or without images.
    """
    text = os.fspath(path)
    if not text:
        raise DataError(f"data.path is empty: give {KINDS}")
    if text.startswith("file://"):
        text = text.removeprefix("file://")
    if is_remote(text):
        check_address(text)
        return _open_remote(text, cache or default_cache())
    try:
        if os.path.isdir(text):
            return _open_folder(text, cache)
        if is_manifest(text):
            return _open_manifest(text, cache)
        if not os.path.lexists(text) and any(sign in text for sign in "*?[{"):
            return index_shards(_expand(text), cache)
        return index_shards([text], cache)
    except FileNotFoundError as error:
        raise DataError(
            f"data path {error.filename or text} does not exist: give {KINDS}"
        ) from error
    except PermissionError as error:
        raise DataError(
            f"data path {error.filename or text} cannot be read: permission denied to this user"
        ) from error
    except OSError as error:
        raise DataError(
            f"data path {error.filename or text} cannot be read ({error.strerror or error}):"
            f" give {KINDS}"
        ) from error


def _open_remote(url: str, cache: Cache) -> Source:
    if is_manifest(url):
        return _open_manifest(url, cache)
    shards: list[str] = []
    for candidate in _braces(url):
        if not _has_wildcard(candidate):
            shards.append(candidate)
        elif protocol_of(candidate) in ("http", "https"):
            raise DataError(
                f"data path {redact(candidate)} has wildcards, but HTTP servers list no files:"
                " use braces, as shard-{000000..000009}.tar, or a manifest"
            )
        else:
            try:
                found = list_files(candidate, cache.retry)
            except OSError as error:
                raise as_data_error(candidate, error) from error
            if not found:
                raise DataError(f"data path {redact(candidate)} matches nothing")
            shards.extend(found)
    return index_shards(shards, cache)


def _has_wildcard(url: str) -> bool:
    """Question marks begin the query of a HTTP address, brackets hold its IPv6 host."""
    _, _, rest = url.partition("://")
    path = rest.partition("/")[2]
    if protocol_of(url) in ("http", "https"):
        return "*" in path.partition("?")[0]
    return any(sign in path for sign in "*?[")


def _open_manifest(path: str, cache: Cache | None) -> Source:
    retry = cache.retry if cache else Retry()
    shards = read_shards(path, retry)
    if any(is_remote(shard.url) for shard in shards):
        cache = cache or default_cache()
        _check_servers(shards, retry)
    return open_shards(shards, cache)


def _check_servers(shards: Sequence[Shard], retry: Retry) -> None:
    """Looks at two shards of every server, so that wrong credentials are noticed now.

    One of them may be missing: that is for the reading to report.
    """
    by_server: dict[str, list[str]] = {}
    for url in (shard.url for shard in shards if is_remote(shard.url)):
        by_server.setdefault("/".join(url.split("/", 3)[:3]), []).append(url)
    for urls in by_server.values():
        check_address(urls[0])
        try:
            try:
                stat(urls[0], retry)
            except FileNotFoundError:
                stat(urls[-1], retry)
        except OSError as error:
            raise as_data_error(urls[0], error) from error


def _open_folder(root: str, cache: Cache | None) -> Source:
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
        return index_shards(sorted(shards), cache)
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


def _braces(pattern: str) -> list[str]:
    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise DataError(f"data path {redact(pattern)} has a brace that is not closed") from error


def _expand(pattern: str) -> list[str]:
    candidates = _braces(pattern)
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
