"""Look at training data, and measure how fast it can be read.

No model, no GPU: everything here runs on a laptop or on a login node.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from seer_scale.config.argument_types import at_least, command_parser
from seer_scale.errors import DataError

if TYPE_CHECKING:
    from seer_scale.data.bench_pipelines import Crops

EXAMPLES = """\
PATH is what data.path takes: a folder of images, or tar shards.

  seer-scale data index "s3://bucket/shards/*.tar" --out shards.jsonl
  seer-scale data inspect shards/ --out crops.png --count 12 --seed 1
  seer-scale data bench --json bench.json
  seer-scale data bench --images photos/ --seconds 10
"""


def inspect(path: str, out: Path, count: int, seed: int, survey_images: int) -> None:
    """Prints counts, sizes and bad files; writes a contact sheet of crops with their parameters."""
    from seer_scale.data.augment import MultiCrop
    from seer_scale.data.contact_sheet import contact_sheet, spread, survey
    from seer_scale.data.sources import open_source

    source = open_source(path)
    found = survey(source, spread(len(source), survey_images or len(source)))
    print(found.report(len(source)))
    if not found.widths:
        raise DataError(f"data path {path} has no image that can be decoded: no contact sheet")
    crops = MultiCrop((160, 96), (2, 4))
    sheet = contact_sheet(source, crops, count=count, seed=seed)
    try:
        sheet.save(out, "PNG")
    except OSError as error:
        raise DataError(
            f"--out {out} cannot be written ({error.strerror or error}): name another file"
        ) from error
    print(f"crops of {min(count, len(source))} images with their parameters: {out}")


def measure(
    images: str | None, crops: Crops | None, seconds: float | None, json_file: Path | None
) -> None:
    """Measures images per second and core of this loader and of others."""
    from seer_scale.data import bench
    from seer_scale.data.bench_pipelines import Crops

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


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return value


def _crops(text: str) -> Crops:
    from seer_scale.data.bench_pipelines import Crops

    try:
        return Crops.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    """Of this command's line."""
    parser = command_parser(__doc__, EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    text = "counts, sizes, bad files and a contact sheet of crops"
    verb = verbs.add_parser("inspect", help=text, description=text, allow_abbrev=False)
    verb.add_argument("path", metavar="PATH")
    verb.add_argument(
        "--out", type=Path, default=Path("crops.png"), metavar="FILE.png", help="contact sheet"
    )
    verb.add_argument("--count", type=at_least(1), default=8, help="images on the sheet (8)")
    verb.add_argument("--seed", type=at_least(0), default=0, help="of images and crops (0)")
    verb.add_argument(
        "--survey",
        type=at_least(0),
        default=2000,
        metavar="N",
        help="decode N images from all over the collection; 0 means every one (2000)",
    )

    text = "the shards of a collection with their images, as a table and as a manifest"
    verb = verbs.add_parser("index", help=text, description=text, allow_abbrev=False)
    verb.add_argument("path", metavar="PATH")
    verb.add_argument("--cache", type=Path, metavar="DIR", help="for remote shards and indexes")
    verb.add_argument("--cache-gib", type=float, default=50.0, help="its size limit (50)")
    verb.add_argument("--out", metavar="FILE.jsonl", help="write a manifest")

    text = "images per second and core of this loader and of others"
    verb = verbs.add_parser("bench", help=text, description=text, allow_abbrev=False)
    verb.add_argument("--images", metavar="DIR", help="JPEGs; else photographs in three sizes")
    verb.add_argument(
        "--crops",
        type=_crops,
        help="number and size of large and small crops (2x224+6x96, as SwAV)",
    )
    verb.add_argument("--seconds", type=_seconds, help="for each row, about (3)")
    verb.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a file")
    return parser


def main(argv: list[str]) -> int:
    """The command line; 0, or 1 with a sentence."""
    arguments = parser().parse_args(argv)
    match arguments.verb:
        case "index":
            from seer_scale.data.cache import Cache
            from seer_scale.data.index_report import index

            limit = int(arguments.cache_gib * 2**30)
            cache = Cache(arguments.cache, limit) if arguments.cache else None
            index(arguments.path, cache, arguments.out, print)
        case "inspect":
            options = (arguments.out, arguments.count, arguments.seed, arguments.survey)
            inspect(arguments.path, *options)
        case "bench":
            measure(arguments.images, arguments.crops, arguments.seconds, arguments.json)
    return 0
