"""Checks whether MLflow answers; a run works without MLflow, so nothing here is a failure."""

from __future__ import annotations

import base64
import os
import time
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from seer_scale.doctor.finding import Finding
from seer_scale.errors import ConfigError, UserError
from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.uri import environment, one_line, redact, resolve_uri

_SPOOLED = "runs go on without it and keep what they record for `seer-scale sync`"
_SQLITE = "sqlite:///"


def check_mlflow(uri: str | None, timeout: float) -> list[Finding]:
    """Asks the server that a run would use, for at most `timeout` seconds.

    Args:
        uri: as `tracking.uri`; else MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db`.
        timeout: seconds.
    """
    try:
        resolved = resolve_uri(uri)
    except ConfigError as error:
        return [
            Finding("mlflow server", "fail", redact(str(uri)), str(error), "see docs/mlflow.md")
        ]
    if resolved.startswith(_SQLITE):
        return [_database(Path(resolved.removeprefix(_SQLITE)))]
    if not resolved.startswith("http"):
        return [Finding("mlflow server", "ok", redact(resolved), "a database; not connected to")]
    return [_server(resolved, timeout)]


def check_experiment(uri: str | None, name: str) -> list[Finding]:
    """Asks whether the experiment of a run is deleted; imports mlflow, which takes seconds.

    Args:
        uri: as `tracking.uri`.
        name: as `tracking.experiment`.

    Returns:
        One finding; none where the server does not answer, or there is no database yet.
    """
    resolved = resolve_uri(uri)
    if resolved.startswith(_SQLITE) and not Path(resolved.removeprefix(_SQLITE)).exists():
        return []
    os.environ.update(environment(resolved))
    quieten()
    from seer_scale.tracking.mlflow_client import deleted_experiment

    try:
        deleted = deleted_experiment(os.environ["MLFLOW_TRACKING_URI"], name)
    except UserError:
        return []
    if deleted is None:
        return [Finding("experiment", "ok", name, "the server takes runs into it")]
    return [Finding("experiment", "warn", f"{name} is deleted", _SPOOLED, deleted)]


def _database(path: Path) -> Finding:
    where = path if path.exists() else path.parent
    if os.access(where, os.W_OK):
        return Finding("mlflow server", "ok", f"none; the file {path}", "written on this machine")
    advice = "name a server (MLFLOW_TRACKING_URI), or start where you may write"
    return Finding("mlflow server", "warn", f"{path} cannot be written", _SPOOLED, advice)


def _server(uri: str, timeout: float) -> Finding:
    shown = redact(uri).rstrip("/")
    # A call that needs the rights a run needs, unlike /health.
    request = Request(f"{shown}/api/2.0/mlflow/experiments/search?max_results=1")
    known = {**os.environ, **environment(uri)}
    if token := known.get("MLFLOW_TRACKING_TOKEN"):
        request.add_header("Authorization", f"Bearer {token}")
    elif user := known.get("MLFLOW_TRACKING_USERNAME"):
        pair = f"{user}:{known.get('MLFLOW_TRACKING_PASSWORD', '')}"
        request.add_header("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")
    began = time.perf_counter()
    try:
        urlopen(request, timeout=timeout).close()
    except HTTPError as error:
        advice = (
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            if error.code in (401, 403)
            else "look at the server's log"
        )
        return Finding("mlflow server", "warn", f"{shown} answers {error.code}", _SPOOLED, advice)
    except (OSError, HTTPException) as error:
        return Finding(
            "mlflow server",
            "warn",
            f"{shown} does not answer within {timeout:g} s ({one_line(error)})",
            _SPOOLED,
            "is the address right, the server up, the port open from here?",
        )
    milliseconds = 1e3 * (time.perf_counter() - began)
    return Finding("mlflow server", "ok", f"{shown}, {milliseconds:.0f} ms", "it lists experiments")
