"""Keeps a measurement: a JSON file with hardware and versions, and a table in the docs."""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from seer_scale.performance.processor import processor_field

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "torchvision", "deepspeed", "fairscale", "apex", "numpy")


def environment() -> dict[str, Any]:
    """Hardware and versions that a number depends on."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": gpus,
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "cuda": torch.version.cuda if gpus else None,
        "versions": versions(PACKAGES),
    }


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Finds the installed version of every package; None if a package is not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def in_words(env: dict[str, Any]) -> str:
    """Writes the environment of a measurement in one line."""
    where = " + ".join(env["gpus"]) or f"{env['cpu']}, {env['cores']} cores"
    packages = ", ".join(f"{name} {v}" for name, v in env["versions"].items() if v)
    return f"{where}; Python {env['python']}, {packages}"


def save(name: str, command: str, content: dict[str, Any]) -> Path:
    """Writes `benchmarks/results/<name>_<hardware>_<yyyymm>.json` and returns its path."""
    env, now = environment(), datetime.now(UTC)
    hardware = re.sub(r"[^a-z0-9]+", "-", (env["gpus"] or ["cpu"])[0].lower()).strip("-")
    path = RESULTS / f"{name}_{hardware}_{now:%Y%m}.json"
    RESULTS.mkdir(parents=True, exist_ok=True)
    document = {"command": command, "date": f"{now:%Y-%m-%d}", "environment": env, **content}
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Writes a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def put_into(document: Path, marker: str, text: str) -> None:
    """Replaces the text between `<!-- marker -->` and `<!-- /marker -->` in a document.

    Raises:
        ValueError: if the document does not have both markers.
    """
    before, opening, rest = document.read_text().partition(f"<!-- {marker} -->\n")
    _, closing, after = rest.partition(f"<!-- /{marker} -->")
    if not opening or not closing:
        raise ValueError(f"{document} has no <!-- {marker} --> ... <!-- /{marker} -->")
    document.write_text(f"{before}{opening}\n{text.strip()}\n\n{closing}{after}")


def _cpu_name() -> str:
    return processor_field("model name") or platform.processor() or platform.machine()
