"""Sends to MLflow what runs recorded while their server was away."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Of this command's line."""
    parser = argparse.ArgumentParser(
        description="Send to MLflow what runs recorded while the server was away, stopped or slow.",
        epilog="Exits with 0 when nothing is left to send, with 1 otherwise.",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--uri", help="send the whole run to this server instead of its own")
    return parser


def main(argv: list[str]) -> int:
    """Sends each run and says what came of it; 0 if nothing is left to send."""
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
        refused = (
            f", {outcome.rejected} refused (tracking/rejected.jsonl)" if outcome.rejected else ""
        )
        print(
            f"{run_dir}: {outcome.sent} events sent, {outcome.left} left{refused}, "
            f"run {outcome.run_id or 'not created'}"
        )
        if outcome.left:
            print(f"error: {run_dir} is not all sent: {outcome.reason}", file=sys.stderr)
            status = max(status, 1)
    return status
