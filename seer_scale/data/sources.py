"""Sources of encoded images: a folder tree, or WebDataset tar shards with random access.

A source is a numbered list of encoded images. Opening a wrong path raises an error of one sentence,
before training starts.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from seer_scale.data.addresses import check_address, is_remote, protocol_of, redact
from seer_scale.data.cache import Cache, default_cache
from seer_scale.data.image_folder import ImageFolder, list_folder
from seer_scale.data.image_kinds import IMAGE_SUFFIXES, LeftOut
from seer_scale.data.remote import Retry, list_files, stat
from seer_scale.data.server_errors import as_data_error
from seer_scale.data.shard_collections import index_shards, open_shards
from seer_scale.data.shard_manifest import Shard, is_manifest, read_shards
from seer_scale.data.tar_members import KINDS
from seer_scale.errors import DataError

Label = int | str


class Source(Protocol):
    """A numbered list of encoded images; picklable and safe to read from several threads."""

    @property
    def shard_sizes(self) -> NDArray[np.int64]:
        """Images of each of S shards, int64 [S], in the order of numbering; a folder is one."""

    @property
    def left_out(self) -> LeftOut:
        """Files and members that the collection holds and does not use."""

    @property
    def version(self) -> str:
        """16 hex digits that change with the names and counts of the shards or files."""

    def __len__(self) -> int:
        """Number of images."""

    def read(self, index: int) -> bytes:
        """Reads an encoded image.

        Raises:
            OSError: the image cannot be read.
        """

    def name(self, index: int) -> str:
        """Returns the name by which a person finds the image; reads no file."""

    def label(self, index: int) -> Label | None:
        """Returns the class of the image; None if the layout has none."""


def open_source(path: str | os.PathLike[str], cache: Cache | None = None) -> Source:
    """Opens a folder of images, a tar shard, a folder or pattern of shards, or a manifest.

    Args:
        path: a local path, or an address that fsspec reads. A pattern may contain braces
            (`shard-{000000..000009}.tar`) and, where files can be listed, wildcards. A manifest
            ends in `.jsonl` or `.parquet`.
        cache: keeps copies of remote shards, and indexes. Without a cache, remote shards go to a
            default folder, and local shards are indexed each time.

    Raises:
        DataError: the path is missing, empty, unreadable or without images; the server or the
            credentials fail; or a shard is not a tar, truncated or without images.
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
                " use braces, such as shard-{000000..000009}.tar, or a manifest"
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
    """Returns whether an address has wildcards; in HTTP, `?` and `[` have other meanings."""
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
    """Asks every server for a shard, so that wrong credentials are found now.

    If the first shard of a server is missing, its last one is asked for; reading reports the
    missing one.
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
    images, shards, left_out = list_folder(root)
    if images and shards:
        raise DataError(
            f"data path {root} holds both images ({images[0]}) and tar shards"
            f" ({os.path.join(root, shards[0])}):"
            " point to a folder with one kind, or to a pattern of shards"
        )
    if shards:
        source = index_shards([os.path.join(root, shard) for shard in shards], cache)
        source.left_out.join(left_out)
        return source
    if not images:
        raise DataError(
            "; ".join(
                [
                    f"data path {root} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
                    " and no .tar shards",
                    *left_out.lines(),
                ]
            )
        )
    return ImageFolder(Path(root), images, left_out)


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
