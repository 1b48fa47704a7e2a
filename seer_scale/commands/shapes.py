"""Renders a labelled set of shapes: `seer-scale shapes OUT --train 1200 --val 600`.

The set has twelve classes in `OUT/train` and `OUT/val`. Use it with
`seer-scale evaluate --data OUT` and `seer-scale pretrain data.path=OUT/train`.
"""

from __future__ import annotations

import argparse

from seer_scale.config.argument_types import at_least
from seer_scale.config.home_folder import expand_home


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "out", type=expand_home, metavar="OUT", help="a folder that does not exist yet"
    )
    parser.add_argument("--train", type=at_least(1), default=1200, help="training images (1200)")
    parser.add_argument("--val", type=at_least(1), default=600, help="validation images (600)")
    parser.add_argument("--size", type=at_least(16), default=96, help="image side in pixels (96)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="seed of everything drawn (0)")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    arguments = parser().parse_args(argv)

    from seer_scale.data.generate.shapes import write_shapes

    write_shapes(
        arguments.out,
        train=arguments.train,
        val=arguments.val,
        size=arguments.size,
        seed=arguments.seed,
    )
    print(f"{arguments.train} training and {arguments.val} validation images: {arguments.out}")
    return 0
