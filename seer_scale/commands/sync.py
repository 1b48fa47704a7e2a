"""Sends to MLflow the records of runs whose server was away."""

from __future__ import annotations

import argparse
import sys

from seer_scale.config.home_folder import expand_home, local_path


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = argparse.ArgumentParser(
        description="Send to MLflow what runs recorded while the server was away, stopped or slow.",
        epilog="Exits with 0 when MLflow has everything, with 1 when anything is left or refused.",
    )
    parser.add_argument("run_dirs", nargs="+", type=local_path, metavar="RUN_DIR")
    parser.add_argument(
        "--uri", type=expand_home, help="send the whole run to this server instead of its own"
    )
    return parser


def main(argv: list[str]) -> int:
    """Sends each run and prints the result; returns 0 if MLflow has everything."""
    arguments = parser().parse_args(argv)
    from seer_scale.errors import UserError
    from seer_scale.tracking.sender import sync

    status = 0
    for run_dir in arguments.run_dirs:
        try:
            outcome = sync(run_dir, arguments.uri)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            status = max(status, error.exit_status)
            continue
        left = f"{outcome.left} left"
        if outcome.rejected:
            left = f"{outcome.rejected} refused" + (f", {left}" if outcome.left else "")
        print(
            f"{run_dir}: {outcome.sent} events sent, {left}, run {outcome.run_id or 'not created'}"
        )
        if outcome.refusals:
            print(f"error: {run_dir}: {outcome.refusals}", file=sys.stderr)
            status = max(status, 1)
        if outcome.left:
            print(f"error: {run_dir} is not all sent: {outcome.reason}", file=sys.stderr)
            status = max(status, 1)
    return status
