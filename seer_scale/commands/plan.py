"""What a run will take, before it is paid for: `seer-scale plan --recipe R --hardware H ...`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from seer_scale.config.argument_types import Parser, at_least
from seer_scale.errors import ConfigError

if TYPE_CHECKING:
    from seer_scale.planner.planned import Plan
    from seer_scale.planner.search import Found

SHOWN = 12  # lines of a search
DESCRIPTION = """\
Memory, traffic, time and cost of a run on hardware that need not be there.

A plan that does not fit is an answer and no error: the last lines say by how much and what would,
`fits` in the JSON says it to scripts, and the exit status is 0.
"""
EXAMPLES = """\
  seer-scale plan --recipe seer_256gf --hardware h100_80gb --nodes 8 --gpus-per-node 8
  seer-scale plan --recipe seer_rg10b --hardware a100_40gb --nodes 62 --gpus-per-node 8 \\
    --strategy fsdp --json plan.json
  seer-scale plan --recipe seer_256gf --hardware h200_141gb --nodes 8 --gpus-per-node 8 \\
    --search
"""
# What takes least memory of a rank, with strategy fsdp.
ROOMIEST = (
    "sharding.activation_checkpointing=full",
    "sharding.checkpoint_groups=null",
    "sharding.sync_bn_group_size=0",
)


def parser() -> argparse.ArgumentParser:
    """Of this command's line."""
    parser = Parser(
        usage="%(prog)s --recipe R --hardware H --nodes N --gpus-per-node G [--strategy S] "
        "[--search] [--images I] [--json FILE] [section.key=value ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", required=True, help="as seer-scale pretrain takes it")
    parser.add_argument("--hardware", required=True, help="a profile's name, or a .yaml like one")
    parser.add_argument("--nodes", required=True, type=at_least(1), help="machines")
    parser.add_argument("--gpus-per-node", required=True, type=at_least(1), help="ranks of each")
    parser.add_argument(
        "--strategy",
        help="ddp, fsdp, hsdp, zero0, zero1, zero2 or zero3; else the recipe's own",
    )
    parser.add_argument("--search", action="store_true", help="rank all that fit, say the best")
    parser.add_argument("--images", type=at_least(1), help="of the whole run, for days and hours")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the plan there")
    return parser


def describe(plan: Plan) -> str:
    """A plan in lines."""
    sharding, train = plan.config.sharding, plan.config.train
    shape, flops, terms = plan.shape, plan.flops, plan.time
    lines = [
        f"{plan.config.recipe}: {plan.config.model.trunk} on {plan.nodes} x {plan.gpus_per_node} "
        f"{plan.hardware.name}",
        f"{plan.strategy}, checkpointing {sharding.activation_checkpointing}, "
        f"{train.micro_batch_size} images a rank, {plan.global_batch:,} a step, "
        f"SyncBatchNorm groups of {sharding.sync_bn_group_size or plan.world}, {train.precision}",
        "",
        f"parameters       {shape.total:,} = trunk {shape.trunk:,} + head {shape.head:,} + "
        f"prototypes {shape.prototypes:,}",
        f"TFLOP per image  {flops.training / 1e12:.4g} forward and backward, "
        f"{flops.recompute / 1e12:.4g} recomputed; forward per crop: "
        + ", ".join(f"{size} px {count / 1e12:.4g}" for size, count in flops.by_size.items()),
        "",
        "GiB per rank",
        *[f"  {kind:<16}{gib:9.3f}" for kind, gib in plan.memory.gib().items()],
        f"  of {plan.hardware.usable_gib:.1f}: {verdict(plan)}",
        "",
        "MB sent per rank and step",
        *[f"  {kind:<16}{count / 1e6:9.1f}" for kind, count in plan.bytes_per_step.items()],
        "",
        "milliseconds of a step",
        *[f"  {term:<16}{1e3 * s:9.1f}" for term, s in vars(terms).items()],
        f"  {'total':<16}{1e3 * terms.total:9.1f}",
        "",
        f"{plan.images_per_second:,.0f} images/s, MFU {100 * plan.mfu:.1f} %; {plan.images:.4g} "
        f"images take {plan.days:.3g} days, {plan.days * 24 * plan.world:,.0f} GPU-hours",
        "(convolutions at "
        f"{100 * plan.hardware.efficiency:.3g} % of the peak: "
        f"{plan.hardware.efficiency_source.strip()})",
        "",
        plan.command,
    ]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    """Whether a plan fits, in words."""
    if plan.fits:
        return f"fits, {-plan.missing_gib:.1f} GiB to spare"
    return f"does not fit, {plan.missing_gib:.1f} GiB too much"


def table(found: Found) -> str:
    """The fastest plans of a search."""
    head = f"{'strategy':<9}{'recompute':<11}{'images':>7}{'group':>7}"
    head += f"{'GiB':>9}{'img/s':>10}{'MFU %':>8}"
    lines = [f"{len(found.fitting)} of {found.tried} configurations fit", "", head]
    for plan in found.fitting[:SHOWN]:
        sharding = plan.config.sharding
        lines.append(
            f"{plan.strategy:<9}{sharding.activation_checkpointing:<11}"
            f"{plan.config.train.micro_batch_size:>7}"
            f"{sharding.sync_bn_group_size or plan.world:>7}"
            f"{plan.memory.gib()['total']:>9.1f}{plan.images_per_second:>10,.0f}"
            f"{100 * plan.mfu:>8.1f}"
        )
    return "\n".join(lines)


def advice(found: Found, more: Plan | None) -> str:
    """What would fit in the place of a plan that does not."""
    if found.fitting:
        best = found.fitting[0]
        sharding = best.config.sharding
        return (
            f"what fits here, the fastest: {best.strategy}, "
            f"activation_checkpointing={sharding.activation_checkpointing}, "
            f"{best.config.train.micro_batch_size} images a rank "
            f"({best.memory.gib()['total']:.1f} GiB)\n{best.command}"
        )
    least = found.nearest
    text = "nothing fits here"
    if least is not None:
        text += (
            f": the least is {least.memory.gib()['total']:.1f} GiB, with {least.strategy}, "
            f"activation_checkpointing={least.config.sharding.activation_checkpointing} and "
            f"{least.config.train.micro_batch_size} images a rank, "
            f"{least.missing_gib:.1f} GiB too much"
        )
    if more is not None:
        nodes = "1 node" if more.nodes == 1 else f"{more.nodes} nodes"
        text += f"; {more.strategy} with full recomputation fits {nodes} of this kind"
    return text


def others(overrides: Sequence[str]) -> list[str]:
    """Overrides but those that `ROOMIEST` and its strategy decide."""
    decided = {"sharding.strategy", "sharding.deepspeed_config", "sharding.shard_size"}
    decided |= {key for key, _, _ in (line.partition("=") for line in ROOMIEST)}
    return [line for line in overrides if line.partition("=")[0] not in decided]


def main(argv: Sequence[str]) -> int:
    """The command line; 0, also for a plan that does not fit."""
    options, rest = parser().parse_known_args(argv)
    unknown = [argument for argument in rest if argument.startswith("-")]
    if unknown:
        raise ConfigError(f"{unknown[0]} is not an option; see --help")

    # torch is first imported here: --help answers at once.
    from seer_scale.planner.memory import GIB
    from seer_scale.planner.plan import plan
    from seer_scale.planner.planned import write_json
    from seer_scale.planner.search import nodes_needed, search

    where = {"gpus_per_node": options.gpus_per_node, "strategy": options.strategy}
    own = plan(
        options.recipe,
        options.hardware,
        nodes=options.nodes,
        overrides=rest,
        images=options.images,
        **where,
    )
    content = own.to_dict()
    if not options.search:
        print(describe(own))
        if not own.fits:
            takes, has = own.memory.total / GIB, own.hardware.usable_gib
            print(f"\nthis plan does not fit: a rank takes {takes:.1f} GiB and has {has:.1f}")
    if options.search or not own.fits:
        found = search(
            options.recipe, options.hardware, nodes=options.nodes, overrides=rest, **where
        )
        if not found.fitting:
            more = nodes_needed(
                options.recipe,
                options.hardware,
                gpus_per_node=options.gpus_per_node,
                strategy="fsdp",
                overrides=[*others(rest), *ROOMIEST],
            )
            print(f"\n{advice(found, more)}")
        elif options.search:
            print(f"{table(found)}\n\n{found.fitting[0].command}")
        else:
            print(f"\n{advice(found, None)}")
        if options.search:
            content = {
                **(found.fitting[0].to_dict() if found.fitting else content),
                "tried": found.tried,
                "ranking": [fitting.to_dict() for fitting in found.fitting],
            }
    if options.json:
        write_json(content, options.json)
    return 0
