"""Quiets MLflow: no telemetry, no extra output, no minute-long retries."""

from __future__ import annotations

import logging
import os
import warnings

DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "GIT_PYTHON_REFRESH": "quiet",
}


def quieten() -> None:
    """Sets variables that the user has not set; call before the first import of mlflow."""
    for name, value in DEFAULTS.items():
        os.environ.setdefault(name, value)
    level = os.environ["MLFLOW_LOGGING_LEVEL"].upper()
    if level in logging.getLevelNamesMapping():  # for an mlflow that is imported already
        logging.getLogger("mlflow").setLevel(level)
    for text in ("input example was not provided", "Any type hint is inferred"):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
