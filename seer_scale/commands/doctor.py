"""Checks this machine and says what each finding means: `seer-scale doctor`.

The exit status is 1 if anything fails, that is, if runs would not work here. Warnings name what
makes runs slower, or what only some runs need.

With `--run RECIPE` and the keys of a run it checks what this very run needs here: memory, open
files, disks, locks, port, clock, images and MLflow. Keys that cannot be trained end it with 2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from seer_scale.config import recipe
from seer_scale.config.argument_types import at_least, command_parser
from seer_scale.config.ds_config import ds_config_of
from seer_scale.config.home_folder import expand_home, local_path
from seer_scale.config.shipped import RECIPES
from seer_scale.errors import ConfigError

if TYPE_CHECKING:
    from seer_scale.doctor import Finding

EXAMPLES = """\
  seer-scale doctor --run-dir /scratch/runs --mlflow-uri http://mlflow:5000
  seer-scale doctor --json > doctor.json
  seer-scale doctor --run seer_32gf --ranks 8 --deepspeed_config ds_configs/zero2.json \\
    data.path=/data/images run.dir=/scratch/runs/first
  seer-scale doctor --quick        # a container's health check: some seconds, no torch, no disk
"""
QUICK_SECONDS, SECONDS = 2.0, 10.0  # that MLflow may take
IMAGES_SECONDS = 60.0  # that a run's images may take; remote shards are copied meanwhile
# What a finding says of a run.
PLAIN = {"ok": "ok", "warn": "warn", "fail": "fail"}
WORDS = {"ok": "ok", "warn": "slow or late", "fail": "will fail"}


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--run-dir",
        type=local_path,
        default=Path("runs"),
        help="folder whose disk is measured (runs)",
    )
    parser.add_argument(
        "--mlflow-uri", type=expand_home, metavar="URI", help="else MLFLOW_TRACKING_URI's"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="versions, driver, memory and MLflow only"
    )
    run = parser.add_argument_group("a run", "the keys and options are those of pretrain")
    run.add_argument("--run", metavar="RECIPE", help="check what this run needs here")
    run.add_argument("--ranks", type=at_least(1), help="ranks on this machine; else one per GPU")
    run.add_argument("--nodes", type=at_least(1), default=1, help="machines of the run (1)")
    run.add_argument(
        "--seconds",
        type=at_least(1),
        default=IMAGES_SECONDS,
        help=f"seconds that the images may take to answer ({IMAGES_SECONDS:g})",
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns 1 if anything fails, else 0.

    Raises:
        ConfigError: a run whose keys cannot be trained.
    """
    arguments, keys = parser().parse_known_args(argv)
    if arguments.run is not None:
        yielded = findings_of_run(arguments, keys)
        words = WORDS
    else:
        arguments = parser().parse_args(argv)
        yielded = findings(arguments.run_dir, arguments.mlflow_uri, quick=arguments.quick)
        words = PLAIN
    found = []
    for finding in yielded:
        found.append(finding)
        if not arguments.json:
            print(in_words(finding, words), flush=True)
    counts = {kind: sum(one.status == kind for one in found) for kind in ("ok", "warn", "fail")}
    if arguments.json:
        print(json.dumps({"findings": [asdict(one) for one in found], "counts": counts}, indent=1))
    else:
        print(f"\n{summary(counts) if arguments.run is None else summary_of_run(counts)}")
    return int(counts["fail"] > 0)


def findings(run_dir: Path, mlflow_uri: str | None, *, quick: bool) -> Iterator[Finding]:
    """Yields all findings, one by one.

    Args:
        run_dir: folder whose disk is measured.
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


def summary(counts: Mapping[str, int]) -> str:
    """Formats the number of findings of each status."""
    warnings, errors = (
        f"{counts[kind]} {word}{'' if counts[kind] == 1 else 's'}"
        for kind, word in (("warn", "warning"), ("fail", "error"))
    )
    return f"{counts['ok']} ok, {warnings}, {errors}"


def summary_of_run(counts: Mapping[str, int]) -> str:
    """Formats the number of findings about a run, and what follows from them."""
    listed = ", ".join(f"{counts[status]} {word}" for status, word in WORDS.items())
    return f"{listed}: " + ("this run will fail here" if counts["fail"] else "this run can start")


def findings_of_run(arguments: argparse.Namespace, keys: list[str]) -> Iterator[Finding]:
    """Yields what a run needs here, one by one.

    Args:
        arguments: as `parser` reads them.
        keys: the keys and options of the run.

    Raises:
        ConfigError: the run cannot be trained.
    """
    import torch

    from seer_scale.train.build_checks import check_start
    from seer_scale.train.build_findings import run_findings

    nodes, ranks = arguments.nodes, arguments.ranks or max(1, torch.cuda.device_count())
    if torch.cuda.is_available() and ranks > torch.cuda.device_count():
        raise ConfigError(
            f"--ranks is {ranks}, but this machine has {torch.cuda.device_count()} GPUs: give at "
            "most one rank for each"
        )
    argv = ["--recipe", arguments.run, *keys]
    parsed = recipe.parse(argv, recipes=RECIPES, ranks=nodes * ranks)
    config = parsed.config
    check_start(
        config,
        ds_config_of(config, nodes * ranks),
        world_size=nodes * ranks,
        local_world_size=ranks,
        cuda=torch.cuda.is_available(),
    )
    yield from run_findings(
        config, parsed.resume, nodes=nodes, ranks=ranks, seconds=arguments.seconds
    )


def in_words(finding: Finding, words: Mapping[str, str] = PLAIN) -> str:
    """Formats a finding on one or two lines.

    Args:
        finding: the finding.
        words: for each status; all of them are padded to the longest.
    """
    width = max(len(word) for word in words.values()) + 1
    said = words[finding.status]
    line = f"{said:<{width}} {finding.name:<16} {finding.value}: {finding.meaning}"
    return f"{line}\n{'':<{width + 1}}-> {finding.advice}" if finding.advice else line
