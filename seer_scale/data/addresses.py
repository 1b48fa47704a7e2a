"""Addresses of remote files, such as `https://host/shard.tar` or `s3://bucket/shard.tar`."""

from __future__ import annotations

import re

import fsspec

from seer_scale.errors import DataError

_ADDRESS = re.compile(r"^(\w[\w+.-]*(?:::\w[\w+.-]*)*)://")
_ANY_ADDRESS = re.compile(r"\w[\w+.-]*://[^\s'\"]+")


def is_remote(path: str) -> bool:
    """Returns whether `path` is an address, not a path on this machine."""
    return _ADDRESS.match(path) is not None


def protocol_of(url: str) -> str:
    """Returns the protocol before `://` in lower case; empty for a local path."""
    match = _ADDRESS.match(url)
    return match[1].lower() if match else ""


def redact(text: str) -> str:
    """Returns `text` with user names, passwords and signatures removed from its addresses."""
    if "://" not in text:
        return text
    if is_remote(text):
        return _strip(text)
    return _ANY_ADDRESS.sub(lambda match: _strip(match[0]), text)


def _strip(address: str) -> str:
    if not any(sign in address for sign in "@?#"):
        return address
    address = re.sub(r"://[^/]*@", "://", address)
    # Outside HTTP, a question mark without assignments is a wildcard.
    secret = r"[?#].*" if address.lower().startswith("http") else r"\?.*=.*"
    return re.sub(secret, "?...", address)


def server_of(url: str) -> str:
    """Returns the name of an address's server or bucket for error sentences."""
    protocol, _, rest = redact(url).partition("://")
    host = rest.partition("/")[0]
    return f"server {host}" if protocol in ("http", "https") else f"bucket {protocol}://{host}"


def check_address(url: str) -> None:
    """Checks that an installed package reads such addresses.

    Raises:
        DataError: no package does, or the address chains file systems.
    """
    protocol = protocol_of(url)
    if "::" in protocol:
        raise DataError(f"data path {redact(url)} chains file systems: give the address of a file")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise DataError(f"data path {redact(url)} cannot be read: {error}") from error
    except ValueError as error:
        raise DataError(
            f"data path {redact(url)} has the unknown protocol {protocol}: give a local path,"
            " http://, https://, s3:// or what an installed fsspec package reads"
        ) from error
