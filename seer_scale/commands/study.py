"""Runs a scaling study: `seer-scale study --study FILE`, and again after a kill.

Points are ordinary runs of `pretrain`, judged by `evaluate`; the report is one HTML page. Finished
points are not repeated.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from seer_scale.config.argument_types import at_least, command_parser

EXAMPLES = """\
  seer-scale study --study launch/studies/demo.yaml --dry-run
  seer-scale study --study launch/studies/demo.yaml
  seer-scale study --study launch/studies/demo.yaml --slurm study.sbatch
"""


def parser() -> argparse.ArgumentParser:
    """Of this command's line."""
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("--study", type=Path, required=True, metavar="FILE", help="the study, YAML")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of the study (runs/studies/<its name>)"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print every point with its cost and memory"
    )
    what.add_argument(
        "--report", action="store_true", help="write the report of the points that are finished"
    )
    what.add_argument(
        "--point", type=at_least(0), metavar="N", help="run this point only, as a SLURM array does"
    )
    what.add_argument("--slurm", type=Path, metavar="FILE", help="write a SLURM array job")
    return parser


def main(argv: list[str]) -> int:
    """The command line; 0, or 1 if a point failed."""
    arguments = parser().parse_args(argv)
    from seer_scale.studies import commands

    study, root, points = commands.open_study(arguments.study, arguments.out)
    if arguments.dry_run:
        print(commands.forecast(study, root, points))
        return 0
    if arguments.slurm is not None:
        arguments.slurm.write_text(commands.slurm_array(study, arguments.study, root, points))
        print(f"sbatch {arguments.slurm}")
        return 0
    if arguments.report:
        commands.report(study, root, points, print)
        return 0
    if arguments.point is not None:
        commands.run_one(study, root, points, arguments.point, print)
        return 0
    return commands.run_all(study, root, points, print)
