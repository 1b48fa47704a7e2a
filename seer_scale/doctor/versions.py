"""Compares Python and packages with the requirements of setup.py, without importing them."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

from seer_scale.doctor.finding import Finding

LEAST_PYTHON = (3, 11)
SHOWN = ("torch", "torchvision", "deepspeed", "mlflow")  # a line each; of the others only faults


def check_versions() -> list[Finding]:
    """Checks Python and every required package."""
    return [_python(), *_packages()]


def _python() -> Finding:
    good = sys.version_info >= LEAST_PYTHON
    return Finding(
        "python",
        "ok" if good else "fail",
        platform.python_version(),
        "recent enough" if good else "older than the code is written for",
        "" if good else f"install Python {'.'.join(map(str, LEAST_PYTHON))} or newer",
    )


def _packages() -> list[Finding]:
    try:
        required = [Requirement(text) for text in requires("seer-scale") or []]
    except PackageNotFoundError:
        return [
            Finding(
                "packages",
                "warn",
                "seer-scale is not installed",
                "it runs from a folder, so what it requires is not known",
                "pip install -e . in the clone, or `make setup`",
            )
        ]
    needed = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    found = [_package(one) for one in needed]
    return [one for one in found if one.name in SHOWN or one.status != "ok"]


def _package(required: Requirement) -> Finding:
    name = required.name
    advice = f"pip install '{required}', or `make setup`, which installs everything as tested"
    try:
        installed = version(name)
    except PackageNotFoundError:
        return Finding(name, "fail", "not installed", "Seer Scale needs it", advice)
    if not required.specifier.contains(installed, prereleases=True):
        return Finding(name, "fail", installed, f"{required.specifier} is needed", advice)
    return Finding(name, "ok", installed, f"within {required.specifier}")
