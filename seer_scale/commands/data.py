"""Inspect training data, and measure how fast images can be read.

Needs neither a model nor a GPU: all of it runs on a laptop or a login node.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from seer_scale.config import RunConfig, schema
from seer_scale.config.argument_types import at_least, command_parser
from seer_scale.config.home_folder import expand_home, local_path
from seer_scale.config.recipe import parse
from seer_scale.config.shipped import RECIPES, SHIPPED
from seer_scale.errors import ConfigError, DataError, UserError

if TYPE_CHECKING:
    from benchmarks.loader_pipelines import Crops

EXAMPLES = """\
PATH is anything that data.path accepts: a folder of images, or tar shards.

  seer-scale data index "s3://bucket/shards/*.tar" --out shards.jsonl
  seer-scale data inspect shards/ --out crops.png --count 12
  seer-scale data inspect photos/ --recipe demo data.crop_sizes=[128,64]   # what this run sees
  seer-scale data bench --json bench.json
  seer-scale data bench --images photos/ --seconds 10
"""


def inspect(
    path: str,
    out: Path,
    count: int,
    seed: int | None,
    survey_images: int,
    config: RunConfig | None = None,
) -> None:
    """Prints counts, sizes and bad files; writes a contact sheet of crops with their parameters.

    Args:
        path: the collection.
        out: file of the sheet.
        count: images on the sheet.
        seed: seed of images and crops; None means that of the run, or 0.
        survey_images: images that are decoded; 0 means all.
        config: configuration of the run whose crops are drawn; None means two large and four small
            crops of random images.
    """
    from seer_scale.data.augment import MultiCrop
    from seer_scale.data.inspection import (
        draw_crops,
        first_images,
        random_images,
        spread,
        survey,
    )
    from seer_scale.data.sources import open_source

    source = open_source(path)
    found = survey(source, spread(len(source), survey_images or len(source)))
    print(found.report(source))
    if not found.widths:
        raise DataError(f"data path {path} has no image that can be decoded: no contact sheet")
    if config is None:
        crops, choice = MultiCrop((160, 96), (2, 4)), random_images(source, seed or 0)
        whose = "random images, not of a recipe"
    else:
        from seer_scale.train.build_images import transform_of

        seed = config.run.seed if seed is None else seed
        crops, choice = transform_of(config), first_images(source, seed, config.data.window)
        whose = f"the first images of a run of {config.recipe} with run.seed={seed}"
    sheet = draw_crops(source, crops, choice, count=count)
    try:
        sheet.save(out, "PNG")
    except OSError as error:
        raise DataError(
            f"{out} cannot be written ({error.strerror or error}): name another file with --out"
        ) from error
    sizes = " and ".join(f"{n} x {size}" for n, size in zip(crops.counts, crops.sizes, strict=True))
    print(
        f"crops of {sizes} pixels, colour distortion {crops.color_distortion:g}, of "
        f"{min(count, len(source))} images ({whose}), with their parameters: {out}"
    )


def measure(
    images: str | None, crops: Crops | None, seconds: float | None, json_file: Path | None
) -> None:
    """Measures images per second and core of this loader and of others."""
    _need_clone()
    from benchmarks import loader_rates as bench
    from benchmarks.loader_pipelines import Crops

    crops = crops or Crops.parse(bench.SWAV_CROPS)
    rows: list[bench.Row] = []
    for image_set in bench.photograph_sets() if images is None else [bench.folder_set(images)]:
        size = sum(map(len, image_set.files)) / len(image_set.files)
        print(
            f"{image_set.name}: {len(image_set.files)} JPEGs of {size / 1000:,.0f} kB on average",
            flush=True,
        )
        rows += bench.measure(image_set, crops=crops, seconds=seconds or bench.SECONDS)
    print(bench.table(rows))
    if json_file is not None:
        try:
            json_file.write_text(json.dumps([row._asdict() for row in rows], indent=1) + "\n")
        except OSError as error:
            raise DataError(
                f"--json {json_file} cannot be written ({error.strerror or error}):"
                " name another file"
            ) from error


def _of_recipe(words: list[str], recipe: str | None) -> tuple[str, RunConfig | None]:
    """Returns the path of the images, and the configuration of the run that shall see them.

    Args:
        words: a path and `section.key=value` texts.
        recipe: name or file of a recipe.

    Raises:
        ConfigError: there is no path, or more than one; keys without a recipe; or a wrong key.
    """
    sections = tuple(f"{section}." for section in schema.sections())
    keys = [word for word in words if "=" in word and word.startswith(sections)]
    paths = [word for word in words if word not in keys]
    if len(paths) > 1:
        raise ConfigError(f"two paths are given, {paths[0]} and {paths[1]}: give one")
    if recipe is None:
        if keys:
            raise ConfigError(f"{keys[0]} is a key of a recipe: add --recipe NAME")
        if not paths:
            raise ConfigError("no images are named: give a PATH, or --recipe NAME")
        return paths[0], None
    argv = ["--recipe", recipe, *keys, *(f"data.path={path}" for path in paths)]
    config = parse(
        argv, recipes=RECIPES, ranks=1
    ).config  # crops are the same on any number of ranks
    return config.data.path, config


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _need_clone() -> None:
    """Makes `benchmarks` importable, which a clone has beside the package and a wheel leaves out.

    Raises:
        UserError: this is not a clone.
    """
    if not (SHIPPED / "benchmarks" / "loader_rates.py").is_file():
        raise UserError(
            "seer-scale data bench compares loaders with code that the installed package leaves "
            "out: clone the repository and run `seer-scale data bench` there"
        )
    sys.path.insert(0, str(SHIPPED))


def _crops(text: str) -> Crops:
    _need_clone()
    from benchmarks.loader_pipelines import Crops

    try:
        return Crops.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = command_parser(__doc__, EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    text = "show counts, sizes and bad files; draw a contact sheet of crops"
    verb = verbs.add_parser("inspect", help=text, description=text, allow_abbrev=False)
    verb.add_argument(
        "words",
        nargs="*",
        type=expand_home,
        metavar="PATH [section.key=value ...]",
        help="the images, unless the recipe or data.path=... names them; keys of the recipe",
    )
    verb.add_argument(
        "--recipe",
        type=expand_home,
        metavar="NAME",
        help="draw the crops that a run of this recipe sees first: its sizes, counts, scales, "
        "strength, order and seed",
    )
    verb.add_argument(
        "--out",
        type=local_path,
        default=Path("crops.png"),
        metavar="FILE.png",
        help="file of the contact sheet (crops.png)",
    )
    verb.add_argument("--count", type=at_least(1), default=8, help="images on the sheet (8)")
    verb.add_argument(
        "--seed", type=at_least(0), help="seed of images and crops (run.seed of the recipe, or 0)"
    )
    verb.add_argument(
        "--survey",
        type=at_least(0),
        default=2000,
        metavar="N",
        help="decode N evenly spaced images; 0 means all (2000)",
    )

    text = "list the shards of a collection and their images; write a manifest"
    verb = verbs.add_parser("index", help=text, description=text, allow_abbrev=False)
    verb.add_argument("path", type=expand_home, metavar="PATH")
    verb.add_argument(
        "--cache",
        type=local_path,
        metavar="DIR",
        help="folder for copies of remote shards and for indexes",
    )
    verb.add_argument(
        "--cache-gib", type=float, default=50.0, help="size limit of the cache in GiB (50)"
    )
    verb.add_argument(
        "--out", type=expand_home, metavar="FILE.jsonl", help="write a manifest of the shards"
    )

    text = "measure images per second and core of this loader and of others; needs a clone"
    verb = verbs.add_parser("bench", help=text, description=text, allow_abbrev=False)
    verb.add_argument(
        "--images",
        type=expand_home,
        metavar="DIR",
        help="folder of JPEGs (else photographs in three sizes)",
    )
    verb.add_argument(
        "--crops",
        type=_crops,
        help="number and size of large and small crops (2x224+6x96, as SwAV)",
    )
    verb.add_argument("--seconds", type=_seconds, help="approximate seconds for each row (3)")
    verb.add_argument(
        "--json", type=local_path, metavar="FILE", help="also write the rows to this file"
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns its exit status."""
    # Only keys may follow the options: argparse takes all words of `inspect` in one place.
    arguments, rest = parser().parse_known_args(argv)
    if rest and (arguments.verb != "inspect" or any(word.startswith("-") for word in rest)):
        parser().error(f"unrecognized arguments: {' '.join(rest)}")
    match arguments.verb:
        case "index":
            from seer_scale.data.cache import Cache
            from seer_scale.data.index_report import index

            limit = int(arguments.cache_gib * 2**30)
            cache = Cache(arguments.cache, limit) if arguments.cache else None
            index(arguments.path, cache, arguments.out, print)
        case "inspect":
            path, config = _of_recipe([*arguments.words, *rest], arguments.recipe)
            options = (arguments.out, arguments.count, arguments.seed, arguments.survey)
            inspect(path, *options, config)
        case "bench":
            measure(arguments.images, arguments.crops, arguments.seconds, arguments.json)
    return 0
