"""Files behind an address such as `https://host/shard.tar` or `s3://bucket/shard.tar`.

Networks fail for moments: whatever may pass is tried again, a download goes on where it broke.
What cannot pass (no such file, no permission, another file under the same address) fails at once.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import fsspec

from seer_scale.data.addresses import protocol_of, redact, server_of
from seer_scale.errors import DataError

PIECE = 8 << 20  # bytes that are asked for at once
_SMALLEST_PIECE = 128 << 10  # where connections break all the time, smaller pieces get through
_CONNECT_SECONDS, _READ_SECONDS = 5, 20  # without an answer, without a byte

_PASSING_STATUS = frozenset({408, 425, 429})  # of 4xx; 5xx pass as well
_NOT_THE_NETWORK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EISDIR, errno.ENOTSUP}
)
_NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
)

T = TypeVar("T")


class NoCredentialsError(PermissionError):
    """The server wants credentials, and none are configured."""


class Stat(NamedTuple):
    """What a server tells about a file.

    Attributes:
        size: in bytes.
        tag: changes when the content does: entity tag or time of the last change; may be empty.
        modified: time of the last change, where the server tells it.
    """

    size: int
    tag: str
    modified: datetime | None


@dataclass(frozen=True)
class Retry:
    """How often and how patiently a request is repeated.

    Attributes:
        tries: of the same request, before it counts as failed.
        first: seconds before the second try; doubles with each further one.
        longest: seconds between two tries at most.
    """

    tries: int = 6
    first: float = 0.2
    longest: float = 10.0

    def wait(self, failures: int) -> None:
        """Sleeps after that many failures, half of the time by chance: nodes shall not march."""
        seconds = min(self.first * 2.0 ** (failures - 1), self.longest)
        time.sleep(seconds * (0.5 + 0.5 * random.random()))


def stat(url: str, retry: Retry) -> Stat:
    """Size and time stamp of a file; no content.

    Raises:
        OSError: FileNotFoundError and PermissionError as for local files.
    """
    return _repeat(url, retry, lambda: _stat(url))


def read_whole(url: str, retry: Retry) -> bytes:
    """Content of a small file; OSError like `stat`."""
    return _repeat(url, retry, lambda: bytes(_system(url).cat_file(_path(url))))


def fetch(url: str, expected: Stat, descriptor: int, retry: Retry) -> None:
    """Downloads a file into an open local one, from its beginning on.

    Args:
        url: what is downloaded.
        expected: what `stat` said of it; the content belongs to this.
        descriptor: of a file that can be written at any position.
        retry: applies to every piece; a piece that arrived is not asked for again.

    Raises:
        OSError: the remote file cannot be read or has changed, or the local one not be written.
    """
    position, piece, failures = 0, PIECE, 0
    while position < expected.size:
        stop = min(position + piece, expected.size)
        try:
            if failures:
                _check_same(url, expected)  # it broke here: it may have been replaced meanwhile
            data = _piece(url, position, stop, expected.size)
        except Exception as error:  # every file system has its own
            failures += 1
            if failures >= retry.tries or not _passes(error):
                raise _as_os_error(url, error) from None
            retry.wait(failures)
            piece = max(piece // 2, _SMALLEST_PIECE)
            continue
        _write(descriptor, data, position)
        position += len(data)
        piece, failures = min(piece + piece // 4, PIECE), 0
    _repeat(url, retry, lambda: _check_same(url, expected))


def list_files(pattern: str, retry: Retry) -> list[str]:
    """Addresses that match a pattern with wildcards, sorted.

    Raises:
        OSError: like `stat`.
    """

    def find() -> list[str]:
        system = _system(pattern)
        return sorted(system.unstrip_protocol(name) for name in system.glob(_path(pattern)))

    return _repeat(pattern, retry, find)


def as_data_error(url: str, error: OSError) -> DataError:
    """One sentence for an address that cannot be used."""
    server, cause = server_of(url), _reason(error)
    if isinstance(error, NoCredentialsError):
        hint = (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            if url.startswith(("s3://", "s3a://"))
            else "configure them as the file system's package says"
        )
        return DataError(f"no credentials for {redact(url)}: {hint}")
    if isinstance(error, FileNotFoundError):
        return DataError(f"data path {redact(url)} does not exist: check the name and the {server}")
    if isinstance(error, PermissionError):
        return DataError(
            f"data path {redact(url)} cannot be read: the {server} refuses it with these"
            f" credentials ({cause})"
        )
    if error.errno in _NOT_THE_NETWORK:
        return DataError(f"data path {redact(url)} cannot be read: {cause}")
    return DataError(f"{server} cannot be reached: {cause}, for {redact(url)}")


@lru_cache(maxsize=16)
def _system_of(protocol: str, process: int) -> Any:
    """The file system; a forked process makes its own, connections cannot be inherited."""
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(
                total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS
            ),
            "trust_env": True,  # proxies
        }
        options["headers"] = {"Accept-Encoding": "identity"}  # or ranges would be of something else
    elif protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": {"total_max_attempts": 1},  # Retry is the one who repeats
        }
    system = fsspec.filesystem(protocol, **options)
    if protocol in ("s3", "s3a"):
        system.retries = 1
    return system


def _system(url: str) -> Any:
    return _system_of(protocol_of(url), os.getpid())


def _path(url: str) -> str:
    return str(_system(url)._strip_protocol(url))


def _stat(url: str) -> Stat:
    info = _system(url).info(_path(url))
    if info.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, f"is a folder: name its shards, as {url}/*.tar", url)
    if info.get("size") is None:
        raise OSError(errno.ENOTSUP, "the server does not tell its size")
    keys = ("LastModified", "Last-Modified", "mtime", "updated", "last_modified", "created")
    modified = next((info[key] for key in keys if info.get(key)), None)
    tag = next((info[key] for key in ("ETag", "etag", "md5Hash") if info.get(key)), modified)
    return Stat(int(info["size"]), str(tag or "").strip('"'), _as_time(modified))


def _as_time(value: object) -> datetime | None:
    try:
        if isinstance(value, str):
            value = parsedate_to_datetime(value)
        if isinstance(value, int | float):
            value = datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError):
        return None
    if not isinstance(value, datetime):
        return None
    return value if value.tzinfo else value.replace(tzinfo=UTC)


def _check_same(url: str, expected: Stat) -> None:
    found = _stat(url)
    if (found.size, found.tag) != (expected.size, expected.tag):
        raise OSError(errno.ESTALE, "it was replaced while it was being read")


def _piece(url: str, start: int, stop: int, size: int) -> bytes:
    data = bytes(_system(url).cat_file(_path(url), start=start, end=stop))
    if len(data) == size:  # a server that knows no ranges answers with everything
        return data[start:]
    if len(data) != stop - start:
        raise ConnectionError(f"{len(data)} bytes came instead of {stop - start}")
    return data


def _write(descriptor: int, data: bytes, position: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _repeat(url: str, retry: Retry, request: Callable[[], T]) -> T:
    failures = 0
    while True:
        try:
            return request()
        except Exception as error:  # every file system has its own
            failures += 1
            if failures >= retry.tries or not _passes(error):
                # The chained error would show the address with its signature.
                raise _as_os_error(url, error) from None
        retry.wait(failures)


def _cause(error: BaseException) -> BaseException:
    """fsspec says of every HTTP failure that the file was not found; this is what happened."""
    cause = error.__cause__
    from_network = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and cause and from_network else error


def _passes(error: BaseException) -> bool:
    """Whether another try may succeed."""
    error = _cause(error)
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _PASSING_STATUS
    if isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return False
    if getattr(error, "errno", None) in (errno.ESTALE, errno.ENOTSUP):
        return False
    if isinstance(error, ImportError | TypeError | AttributeError):
        return False
    return type(error).__name__ not in _NO_CREDENTIALS


def _as_os_error(url: str, error: BaseException) -> OSError:
    error = _cause(error)
    status, reason, name = getattr(error, "status", None), _reason(error), redact(url)
    if type(error).__name__ in _NO_CREDENTIALS:
        return NoCredentialsError(errno.EACCES, f"no credentials: {reason}", name)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, "no such file on the server", name)
    if status in (401, 403) or isinstance(error, PermissionError):
        return PermissionError(errno.EACCES, reason, name)
    return OSError(getattr(error, "errno", None) or errno.EIO, reason, name)


def _reason(error: BaseException) -> str:
    """What happened, in one line without secrets."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP status {status} {getattr(error, 'message', '')}".strip()
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return redact(" ".join(text.split()))[:300]
