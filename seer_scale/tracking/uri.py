"""Tracking URI of a run; credentials stay out of every file.

Run folders are copied, shared and logged as artifacts, so URIs in them are redacted; the sender
gets the credentials through its environment.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from seer_scale.errors import ConfigError

DEFAULT = "sqlite:///mlflow.db"
_SQLITE = "sqlite:///"
_USERINFO = re.compile(r"(?<=://)[^/\s\"']*@")
_QUERY_SECRET = re.compile(r"([?&](?:password|sslpassword|token|secret)=)[^&\s\"']+", re.IGNORECASE)


def resolve_uri(uri: str | None = None) -> str:
    """Returns the tracking URI: `uri`, else MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db`.

    A relative sqlite path is made absolute, so that a run can be sent from any folder later.

    Raises:
        ConfigError: if it is a folder, which MLflow no longer writes to.
    """
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT
    if uri.startswith(_SQLITE):
        return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).expanduser().resolve())
    if uri.startswith("databricks") or ("://" in uri and not uri.startswith("file:")):
        return uri
    raise ConfigError(
        f"tracking.uri is '{redact(uri)}'; MLflow keeps no runs in plain folders any more: "
        f"give the address of a server (http://host:5000) or a database ({DEFAULT})"
    )


def redact(text: str) -> str:
    """Removes user names, passwords and tokens from the URIs in `text`."""
    return _QUERY_SECRET.sub(r"\1***", _USERINFO.sub("", text))


def one_line(error: BaseException) -> str:
    """Message of an exception as one short line without credentials."""
    text = " ".join(redact(str(error)).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def answers(uri: str) -> bool:
    """Tells whether the server of `uri` answers, without the minutes of MLflow's retries."""
    if not uri.startswith("http"):
        return True
    try:
        urlopen(f"{redact(uri).rstrip('/')}/health", timeout=10).close()
    except HTTPError:
        return True
    except OSError:
        return False
    return True


def environment(uri: str) -> dict[str, str]:
    """Environment variables that tell MLflow `uri` with its credentials.

    Credentials of a web address go into MLflow's own variables, because MLflow repeats the
    address in error messages.
    """
    parts = urlsplit(uri)
    if not uri.startswith("http") or parts.username is None:
        return {"MLFLOW_TRACKING_URI": uri}
    return {
        "MLFLOW_TRACKING_URI": redact(uri),
        "MLFLOW_TRACKING_USERNAME": unquote(parts.username),
        "MLFLOW_TRACKING_PASSWORD": unquote(parts.password or ""),
    }


def with_credentials(redacted: str) -> str:
    """Restores the credentials of a redacted URI from the environment, if they are there."""
    known = os.environ.get("MLFLOW_TRACKING_URI", "")
    return known if redact(known) == redacted else redacted
