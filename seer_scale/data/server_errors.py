"""Errors of a server, told apart from errors of the copy on this machine."""

from __future__ import annotations

import errno
import os

from seer_scale.data.addresses import redact, server_of
from seer_scale.errors import DataError

_NOT_THE_NETWORK = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.EISDIR, errno.ENOTSUP}
)


class ServerError(OSError):
    """An address that cannot be used, because of its server or of the way to it."""


class MissingError(ServerError, FileNotFoundError):
    """The server has no such file."""


class RefusedError(ServerError, PermissionError):
    """The server refuses the file with these credentials."""


class NoCredentialsError(ServerError, PermissionError):
    """The server needs credentials, and none are configured."""


def as_data_error(url: str, error: OSError) -> DataError:
    """Returns the sentence for an address that cannot be used, or for its copy on this machine."""
    server, cause = server_of(url), reason_of(error)
    if not isinstance(error, ServerError):
        place = f" of {error.filename}" if isinstance(error.filename, str | os.PathLike) else ""
        return DataError(f"data path {redact(url)} cannot be read: {cause}{redact(str(place))}")
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


def reason_of(error: BaseException) -> str:
    """Describes an error in one line without secrets."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return f"HTTP status {status} {getattr(error, 'message', '')}".strip()
    text = str(getattr(error, "strerror", None) or error) or type(error).__name__
    return redact(" ".join(text.split()))[:300]
