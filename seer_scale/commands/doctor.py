"""Checks this machine and says what each finding means: `seer-scale doctor`.

Exit status 1 if anything fails, that is if runs would not work here; warnings are things that make
them slower, or that only some runs need.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from seer_scale.config.argument_types import command_parser

if TYPE_CHECKING:
    from seer_scale.doctor import Finding

EXAMPLES = """\
  seer-scale doctor --run-dir /scratch/runs --mlflow-uri http://mlflow:5000
  seer-scale doctor --json > doctor.json
  seer-scale doctor --quick        # a container's health check: some seconds, no torch, no disk
"""
QUICK_SECONDS, SECONDS = 2.0, 10.0  # that MLflow may take


def parser() -> argparse.ArgumentParser:
    """Of this command's line."""
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--run-dir", type=Path, default=Path("runs"), help="whose disk is measured (runs)"
    )
    parser.add_argument("--mlflow-uri", metavar="URI", help="else MLFLOW_TRACKING_URI's")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="versions, driver, memory and MLflow only"
    )
    return parser


def main(argv: list[str]) -> int:
    """The command line; 1 if anything fails, else 0."""
    arguments = parser().parse_args(argv)
    found = []
    for finding in findings(arguments.run_dir, arguments.mlflow_uri, quick=arguments.quick):
        found.append(finding)
        if not arguments.json:
            print(in_words(finding), flush=True)
    counts = {kind: sum(one.status == kind for one in found) for kind in ("ok", "warn", "fail")}
    if arguments.json:
        print(json.dumps({"findings": [asdict(one) for one in found], "counts": counts}, indent=1))
    else:
        print(f"\n{counts['ok']} ok, {counts['warn']} to know of, {counts['fail']} to mend")
    return int(counts["fail"] > 0)


def findings(run_dir: Path, mlflow_uri: str | None, *, quick: bool) -> Iterator[Finding]:
    """All findings, one after the other as they come.

    Args:
        run_dir: whose disk is measured.
        mlflow_uri: as `tracking.uri`.
        quick: leaves out what takes torch or seconds.
    """
    from seer_scale.doctor.gpus import check_driver
    from seer_scale.doctor.host import check_host
    from seer_scale.doctor.tracking import check_mlflow
    from seer_scale.doctor.versions import check_versions

    versions = check_versions()
    yield from versions
    yield from check_driver()
    yield from check_host()
    yield from check_mlflow(mlflow_uri, QUICK_SECONDS if quick else SECONDS)
    if quick:
        return
    from seer_scale.doctor.storage import check_storage

    yield from check_storage(run_dir)
    if any(one.name == "torch" and one.status == "fail" for one in versions):
        return
    from seer_scale.doctor.collectives import check_collectives
    from seer_scale.doctor.extras import check_extras
    from seer_scale.doctor.gpus import check_gpus

    yield from check_gpus()
    yield from check_extras()
    yield from check_collectives()


def in_words(finding: Finding) -> str:
    """A finding in one line or two."""
    line = f"{finding.status:<5} {finding.name:<16} {finding.value}: {finding.meaning}"
    return f"{line}\n{'':<6}-> {finding.advice}" if finding.advice else line
