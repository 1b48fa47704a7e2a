"""Plans a run before you pay for it: `seer-scale plan --recipe R --hardware H ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from seer_scale.config.argument_types import Parser, at_least, images, price
from seer_scale.config.home_folder import expand_home, local_path
from seer_scale.errors import ConfigError
from seer_scale.performance.hardware import names

if TYPE_CHECKING:
    from seer_scale.planner.planned import Plan

DESCRIPTION = """\
Computes memory, traffic, time and cost of a run. The hardware need not be present.

A plan that does not fit is an answer, not an error: the last lines say how much memory is missing
and what would fit. Scripts read `fits` in the JSON; the exit status is 0.
"""
EXAMPLES = """\
  seer-scale plan --recipe seer_256gf --hardware h100_80gb --nodes 8 --gpus-per-node 8
  seer-scale plan --recipe seer_rg10b --hardware a100_40gb --nodes 62 --gpus-per-node 8 \\
    --strategy fsdp --json plan.json
  seer-scale plan --recipe seer_256gf --hardware h200_141gb --nodes 8 --gpus-per-node 8 \\
    --search
"""
# The settings that need least memory per rank, with strategy fsdp.
ROOMIEST = (
    "sharding.activation_checkpointing=full",
    "sharding.checkpoint_groups=null",
    "sharding.sync_bn_group_size=0",
)


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = Parser(
        usage="%(prog)s --recipe R --hardware H --nodes N --gpus-per-node G [--strategy S] "
        "[--search] [--images I] [--price-per-gpu-hour P] [--json FILE] [section.key=value ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.example = "--recipe demo --hardware rtx_4090_24gb --nodes 1 --gpus-per-node 1"
    parser.add_argument(
        "--recipe", type=expand_home, required=True, help="recipe, as seer-scale pretrain takes it"
    )
    parser.add_argument(
        "--hardware",
        type=expand_home,
        required=True,
        help=f"name of a hardware profile ({', '.join(names())}), or path of a .yaml file",
    )
    parser.add_argument("--nodes", required=True, type=at_least(1), help="number of machines")
    parser.add_argument(
        "--gpus-per-node", required=True, type=at_least(1), help="ranks per machine"
    )
    parser.add_argument(
        "--strategy",
        help="ddp, fsdp, hsdp, zero0, zero1, zero2 or zero3; default: the recipe's strategy",
    )
    parser.add_argument("--search", action="store_true", help="rank all configurations that fit")
    parser.add_argument(
        "--images", type=images, help="images of the whole run, e.g. 1e9; default: the recipe's"
    )
    parser.add_argument(
        "--price-per-gpu-hour",
        type=price,
        metavar="P",
        help="price of a GPU for an hour, e.g. 2.5; the plan then says what the run costs",
    )
    parser.add_argument(
        "--json", type=local_path, metavar="FILE", help="write the plan to this file"
    )
    return parser


def others(overrides: Sequence[str]) -> list[str]:
    """Drops the overrides whose keys `ROOMIEST` and strategy fsdp set."""
    decided = {"sharding.strategy", "sharding.deepspeed_config", "sharding.shard_size"}
    decided |= {key for key, _, _ in (line.partition("=") for line in ROOMIEST)}
    return [line for line in overrides if line.partition("=")[0] not in decided]


def as_json(plan: Plan, per_hour: float | None) -> dict[str, Any]:
    """Returns a plan as JSON, with its price if that of an hour is known."""
    content = plan.to_dict()
    if per_hour is not None:
        content |= {
            "price_per_gpu_hour": per_hour,
            "price": per_hour * plan.gpu_hours,
        }
    return content


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns 0, also for a plan that does not fit.

    Raises:
        ConfigError: an unknown option, name or key, or a combination that cannot be trained.
    """
    options, rest = parser().parse_known_args(argv)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        raise ConfigError(f"{unknown[0]} is not an option; see --help")

    # Imports torch, so it stands here: --help answers at once.
    from seer_scale.planner.memory import GIB
    from seer_scale.planner.plan import plan
    from seer_scale.planner.planned import write_json
    from seer_scale.planner.search import nodes_needed, search
    from seer_scale.planner.text import advice, describe, table

    where = {"gpus_per_node": options.gpus_per_node, "strategy": options.strategy}
    own = plan(
        options.recipe,
        options.hardware,
        nodes=options.nodes,
        overrides=rest,
        images=options.images,
        **where,
    )
    per_hour = options.price_per_gpu_hour
    content = as_json(own, per_hour)
    if not options.search:
        print(describe(own, per_hour))
        if not own.fits:
            takes, has = own.memory.total / GIB, own.hardware.usable_gib
            print(f"\nthis plan does not fit: a rank needs {takes:.1f} GiB and has {has:.1f}")
    if options.search or not own.fits:
        found = search(
            options.recipe,
            options.hardware,
            nodes=options.nodes,
            overrides=rest,
            images=options.images,
            **where,
        )
        if not found.fitting:
            more = nodes_needed(
                options.recipe,
                options.hardware,
                gpus_per_node=options.gpus_per_node,
                strategy="fsdp",
                overrides=[*others(rest), *ROOMIEST],
            )
            print(f"\n{advice(found, more, per_hour)}")
        elif options.search:
            best = found.fitting[0]
            noted = [f"note: {note}" for note in best.notes]
            print(table(found, per_hour), "", *noted, best.command, sep="\n")
        else:
            print(f"\n{advice(found, None, per_hour)}")
        if options.search:
            content = {
                **(as_json(found.fitting[0], per_hour) if found.fitting else content),
                "tried": found.tried,
                "ranking": [as_json(fitting, per_hour) for fitting in found.fitting],
            }
    if options.json:
        write_json(content, options.json)
    return 0
