"""Renders the labelled set of shapes: `launch/shapes.py OUT --train 1200 --val 600`.

Twelve classes in `OUT/train` and `OUT/val`, which `launch/evaluate.py` takes as `--data OUT` and
`launch/pretrain.py` as `data.path=OUT/train`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone works without installing the package

from seer_scale.argument_types import at_least  # noqa: E402
from seer_scale.errors import UserError, exit_with  # noqa: E402


def main(argv: list[str]) -> int:
    """The command line; 0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(
        prog="launch/shapes.py", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("out", metavar="OUT", help="a folder that does not exist yet")
    parser.add_argument("--train", type=at_least(1), default=1200, help="images (1200)")
    parser.add_argument("--val", type=at_least(1), default=600, help="images (600)")
    parser.add_argument("--size", type=at_least(16), default=96, help="side in pixels (96)")
    parser.add_argument("--seed", type=at_least(0), default=0)
    arguments = parser.parse_args(argv)

    from seer_scale.evaluation.shapes import write_shapes

    write_shapes(
        arguments.out,
        train=arguments.train,
        val=arguments.val,
        size=arguments.size,
        seed=arguments.seed,
    )
    print(f"{arguments.train} training and {arguments.val} validation images: {arguments.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        exit_with(error)
