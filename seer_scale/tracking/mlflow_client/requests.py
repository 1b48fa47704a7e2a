"""How MLflow's client sends requests: patiently, or never twice without a look in between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from mlflow.exceptions import MlflowException

_UPLOAD_TIMEOUT_S, _UPLOAD_RETRIES = 300, 3
_TIMEOUT, _RETRIES = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
_Made = TypeVar("_Made")


def found_or_created(find: Callable[[], _Made | None], create: Callable[[], _Made]) -> _Made:
    """Returns what `find` finds, or else what `create` makes: once, also if a reply is lost.

    MLflow's client repeats a request whose reply does not come, although the server may have done
    what was asked; here `find` looks before `create` is asked again.
    """
    for last in (False, True):
        if (found := find()) is not None:
            return found
        try:
            with _set({_RETRIES: "0"}):
                return create()
        except MlflowException:
            if last:
                raise
    raise AssertionError


@contextmanager
def patient_uploads() -> Iterator[None]:
    """Raises timeout and retries of uploads, which may be repeated as often as it takes.

    A server may answer only after it has stored a large file, and a model is some hundred files.
    """
    least = {_TIMEOUT: _UPLOAD_TIMEOUT_S, _RETRIES: _UPLOAD_RETRIES}
    with _set({name: str(max(value, int(os.environ[name]))) for name, value in least.items()}):
        yield


@contextmanager
def _set(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
