"""Remote files at an address such as `https://host/shard.tar` or `s3://bucket/shard.tar`.

Networks fail for moments: requests with a transient fault are repeated, and a download continues
where it broke. Permanent faults (no such file, no permission, another file at the same address)
fail at once. Credentials may expire during a run: if they are refused, they are read again, once.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import fsspec

from seer_scale.data.addresses import protocol_of, redact
from seer_scale.data.server_errors import (
    MissingError,
    NoCredentialsError,
    RefusedError,
    ServerError,
    reason_of,
)

PIECE = 8 << 20  # bytes per request
_SMALLEST_PIECE = 128 << 10  # if connections break often, smaller pieces still arrive
_CONNECT_SECONDS, _READ_SECONDS = 5, 20  # limits without an answer and without a byte

_PASSING_STATUS = frozenset({408, 425, 429})  # transient ones of 4xx; 5xx are transient too
_NO_CREDENTIALS = frozenset(
    {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound"}
)

_RENEWAL_SECONDS = 10.0  # age of credentials before they are read again
_renewal = threading.Lock()

T = TypeVar("T")


class Stat(NamedTuple):
    """The facts that a server gives about a file.

    Attributes:
        size: size in bytes.
        tag: entity tag or time of the last change, which changes with the content; may be empty.
        modified: time of the last change; None if the server does not give it.
    """

    size: int
    tag: str
    modified: datetime | None


@dataclass(frozen=True)
class Retry:
    """Number of tries of a request, and the waits between them.

    Attributes:
        tries: number of tries before the request has failed.
        first: seconds before the second try; the wait doubles with each further try.
        longest: longest wait between two tries, in seconds.
    """

    tries: int = 6
    first: float = 0.2
    longest: float = 10.0

    def wait(self, failures: int) -> None:
        """Sleeps: exponential backoff with 50 % jitter, so that nodes do not retry in step."""
        seconds = min(self.first * 2.0 ** (failures - 1), self.longest)
        time.sleep(seconds * (0.5 + 0.5 * random.random()))


def stat(url: str, retry: Retry) -> Stat:
    """Asks for size, tag and time of a file, not for its content.

    Raises:
        OSError: the request fails; FileNotFoundError and PermissionError as for local files.
    """
    return _repeat(url, retry, lambda: _stat(url))


def read_whole(url: str, retry: Retry) -> bytes:
    """Reads a small file; raises OSError as `stat` does."""
    return _repeat(url, retry, lambda: bytes(_system(url).cat_file(_path(url))))


def read_range(url: str, start: int, stop: int, size: int, retry: Retry) -> bytes:
    """Reads bytes `start` to `stop` of a file of `size` bytes; raises OSError as `stat` does."""
    return _repeat(url, retry, lambda: _piece(url, start, stop, size))


def fetch(url: str, expected: Stat, descriptor: int, retry: Retry) -> None:
    """Downloads a file into an open local file, from its beginning on.

    Args:
        url: address of the file.
        expected: the result of `stat` that the content has to match.
        descriptor: file descriptor of the local file, writable at any position.
        retry: tries and waits of each piece; a piece that has arrived is not requested again.

    Raises:
        OSError: the remote file cannot be read or has changed, or the local file cannot be
            written.
    """
    position, piece, failures = 0, PIECE, 0
    while position < expected.size:
        stop = min(position + piece, expected.size)
        try:
            if failures:
                _check_same(url, expected)  # the file may have been replaced meanwhile
            data = _piece(url, position, stop, expected.size)
        except Exception as error:  # each file system raises its own types
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
    """Lists the addresses that match a pattern, sorted; raises OSError as `stat` does."""

    def find() -> list[str]:
        system = _system(pattern)
        return sorted(system.unstrip_protocol(name) for name in system.glob(_path(pattern)))

    return _repeat(pattern, retry, find)


@lru_cache(maxsize=16)
def _system_of(protocol: str, process: int) -> Any:
    """Returns a process's own file system; a forked process cannot inherit connections."""
    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if protocol in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(
                total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS
            ),
            "trust_env": True,  # proxies
        }
        # Otherwise ranges count compressed bytes.
        options["headers"] = {"Accept-Encoding": "identity"}
    elif protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": _CONNECT_SECONDS,
            "read_timeout": _READ_SECONDS,
            "retries": {"total_max_attempts": 1},  # `Retry` repeats requests
        }
    system = fsspec.filesystem(protocol, **options)
    if protocol in ("s3", "s3a"):
        system.retries = 1
    system.seer_scale_born = time.monotonic()
    return system


def _renewed(url: str, used: Any) -> bool:
    """Opens a file system anew, with the credentials of now; False if `used` is too young for that.

    Another thread may have done so since `used` was refused.
    """
    with _renewal:
        if _system(url) is used:
            if time.monotonic() - used.seer_scale_born < _RENEWAL_SECONDS:
                return False
            _system_of.cache_clear()
        return True


def _system(url: str) -> Any:
    return _system_of(protocol_of(url), os.getpid())


def _path(url: str) -> str:
    return str(_system(url)._strip_protocol(url))


def _stat(url: str) -> Stat:
    info = _system(url).info(_path(url))
    if info.get("type") == "directory":
        raise IsADirectoryError(errno.EISDIR, f"is a folder: name its shards, as {url}/*.tar", url)
    if info.get("size") is None:
        raise OSError(errno.ENOTSUP, "the server does not give its size")
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
    if len(data) == size:  # a server without ranges sends the whole file
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
    failures, renewed = 0, False
    while True:
        used = None
        try:
            used = _system(url)
            return request()
        except Exception as error:  # each file system raises its own types
            refused = used is not None and not renewed and _is_refusal(url, error)
            if refused and _renewed(url, used):
                renewed = True
                continue
            failures += 1
            if failures >= retry.tries or not _passes(error):
                # The chained error would show the signature in the address.
                raise _as_os_error(url, error) from None
        retry.wait(failures)


def _cause(error: BaseException) -> BaseException:
    """Returns the real cause: fsspec reports every HTTP failure as a missing file."""
    cause = error.__cause__
    from_network = isinstance(cause, OSError) or type(cause).__module__.startswith("aiohttp")
    return cause if isinstance(error, FileNotFoundError) and cause and from_network else error


def _is_refusal(url: str, error: BaseException) -> bool:
    """Returns whether credentials may be the reason: S3 answers 400 to those that have expired."""
    error = _cause(error)
    expired = protocol_of(url) in ("s3", "s3a") and getattr(error, "errno", None) == errno.EINVAL
    refused = isinstance(error, PermissionError) or getattr(error, "status", None) in (401, 403)
    return expired or refused or type(error).__name__ in _NO_CREDENTIALS


def _passes(error: BaseException) -> bool:
    """Returns whether another try may succeed."""
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
    status, reason, name = getattr(error, "status", None), reason_of(error), redact(url)
    if type(error).__name__ in _NO_CREDENTIALS:
        return NoCredentialsError(errno.EACCES, f"no credentials: {reason}", name)
    if status in (404, 410) or isinstance(error, FileNotFoundError):
        return MissingError(errno.ENOENT, "no such file on the server", name)
    if _is_refusal(url, error):
        return RefusedError(errno.EACCES, reason, name)
    return ServerError(getattr(error, "errno", None) or errno.EIO, reason, name)
