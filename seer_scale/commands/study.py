"""Runs a scaling study: `seer-scale study --study FILE`; start it again after a kill.

Points are ordinary runs of `pretrain`, and `evaluate` evaluates them. The report is one HTML page.
Started again, the command skips finished points.
"""

from __future__ import annotations

import argparse
import shlex

from seer_scale.config.argument_types import at_least, command_parser
from seer_scale.config.home_folder import local_path

EXAMPLES = """\
  seer-scale study --study launch/studies/demo.yaml --dry-run
  seer-scale study --study launch/studies/demo.yaml
  seer-scale study --study launch/studies/demo.yaml --status       # also while it runs
  seer-scale study --study launch/studies/demo.yaml --slurm study.sbatch
"""


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument(
        "--study", type=local_path, required=True, metavar="FILE", help="study file, YAML"
    )
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="FOLDER",
        help="folder of the study (default: runs/studies/<its name>)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="only print every point with its cost and memory"
    )
    what.add_argument(
        "--status",
        action="store_true",
        help="only print how far every point is: step, time, loss, top-1 and what is left",
    )
    what.add_argument(
        "--report", action="store_true", help="only write the report of finished points"
    )
    what.add_argument(
        "--point", type=at_least(0), metavar="N", help="only run point N, as a SLURM array does"
    )
    what.add_argument(
        "--slurm", type=local_path, metavar="FILE", help="only write a SLURM array job"
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs the command line; returns 0, or 1 if a point failed.

    Raises:
        UserError: if the study file or a point is wrong, or a single point failed.
    """
    arguments = parser().parse_args(argv)
    from seer_scale.studies import commands

    study, root, points = commands.open_study(arguments.study, arguments.out)
    if arguments.dry_run:
        print(commands.forecast(study, root, points))
        return 0
    if arguments.status:
        print(commands.status(study, root, points))
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
    out = ["--out", str(arguments.out)] if arguments.out else []
    asked = ["seer-scale", "study", "--study", str(arguments.study), *out, "--status"]
    print(f"how far it is, at any time: {shlex.join(asked)}", flush=True)
    return commands.run_all(study, root, points, print)
