"""A plan and a search as lines of text."""

from __future__ import annotations

from collections.abc import Mapping

from seer_scale.config.batches import in_factors, in_images, in_micro_batches, in_ranks
from seer_scale.planner.memory import GIB
from seer_scale.planner.planned import Plan
from seer_scale.planner.search import Found

SHOWN = 12  # lines of a search


def describe(plan: Plan, price: float | None = None) -> str:
    """Writes a plan; one that does not fit says so before all figures, and has no command.

    Args:
        plan: the plan.
        price: price of a GPU for an hour; None leaves the price out.
    """
    layout, batch, terms = plan.layout, plan.batch, plan.time
    shape, flops = plan.shape, plan.flops
    sent = {**plan.bytes_per_step, "total": sum(plan.bytes_per_step.values())}
    spent = {**vars(terms), "total": terms.total}
    group = layout.group_ranks(layout.sync_bn_group_size)
    lines = [
        f"{plan.recipe}: {plan.model.trunk} on {layout.nodes} x {layout.gpus_per_node} ranks, each "
        f"{plan.hardware.name}: {verdict(plan)}",
        f"{plan.images:,} images: {plan.steps:,} steps of {plan.global_batch:,} = "
        f"{in_factors(batch.micro_batch_size, plan.world, batch.gradient_accumulation)}",
        f"{plan.strategy}, checkpointing {plan.activation_checkpointing}, SyncBatchNorm groups of "
        f"{in_ranks(group)}, {batch.precision}",
        *[f"note: {note}" for note in plan.notes],
        "",
        f"parameters       {shape.total:,} = trunk {shape.trunk:,} + head {shape.head:,} + "
        f"prototypes {shape.prototypes:,}",
        f"GFLOP per image  {rounded(flops.training / 1e9)} forward and backward, "
        f"{rounded(flops.recompute / 1e9)} recomputed; forward per crop: "
        + ", ".join(f"{size} px {rounded(count / 1e9)}" for size, count in flops.by_size.items()),
        *block("memory of a rank", plan.memory.gib(), ("GiB", 1), ("MiB", 1024)),
        f"  {'available':<16}{plan.hardware.usable_gib:12,.2f} GiB",
        *block("sent by a rank in a step", sent, ("GB", 1e-9), ("MB", 1e-6)),
        *block("time of a step", spent, ("s", 1), ("ms", 1e3)),
        "",
        ("" if plan.fits else "if it fitted: ") + cost(plan, price),
        scope(plan),
    ]
    if plan.fits:
        lines += ["", plan.command, "", "--search looks for a faster plan"]
    return "\n".join(lines)


def block(
    title: str, figures: Mapping[str, float], large: tuple[str, float], small: tuple[str, float]
) -> list[str]:
    """Writes figures as a block of lines.

    Args:
        title: what the figures are.
        figures: value by name; the last is the largest.
        large: a unit, and how many of it a figure is times.
        small: the same of the unit for figures that are all below one.
    """
    unit, factor = large if list(figures.values())[-1] * large[1] >= 1 else small
    lines = [f"  {name:<16}{value * factor:12,.2f}" for name, value in figures.items()]
    return ["", f"{title}, {unit}", *lines]


def verdict(plan: Plan) -> str:
    """Says whether a plan fits, and how many GiB are free or missing."""
    if plan.fits:
        return f"fits, {-plan.missing_gib:.1f} GiB to spare"
    return f"does not fit, {plan.missing_gib:.1f} GiB too much"


def cost(plan: Plan, price: float | None) -> str:
    """Says what the whole run takes: speed, time, GPU-hours and money.

    Args:
        plan: the plan.
        price: price of a GPU for an hour; None leaves the price out.
    """
    hours = plan.gpu_hours
    on_cpu = plan.hardware.generation == "CPU"
    unit = "core" if on_cpu else "GPU"
    paid = "" if price is None else f", {money(hours * price)} at ${price:,.2f} an hour"
    used = f"{100 * plan.mfu:.0f}" if plan.mfu >= 0.01 else "below 1"
    spent = rounded(hours) if hours >= 0.01 else "less than 0.01"
    return (
        f"{'at most ' if on_cpu else ''}{rounded(plan.images_per_second)} images/s, MFU {used} %; "
        f"the run takes {duration(plan.days)}, {spent} {unit}-hours{paid}"
    )


def money(dollars: float) -> str:
    """Writes a sum of money: in cents below $100, else with three digits that count."""
    if dollars < 0.01:
        return "less than $0.01"
    return f"${dollars:.2f}" if dollars < 100 else f"${rounded(dollars)}"


def scope(plan: Plan) -> str:
    """Says what the speed is: that of the model alone, and where its constant comes from."""
    source = " ".join(plan.hardware.efficiency_source.split())
    told = (
        f"(convolutions at {100 * plan.hardware.efficiency:.3g} % of the peak: {source}; without "
        "the loading of images"
    )
    if plan.hardware.generation == "CPU":
        told += (
            " and the starting of operations: on a CPU these share the cores, and a small trunk "
            "reaches a quarter to a half of this speed"
        )
    return f"{told})"


def duration(days: float) -> str:
    """Writes a time in seconds, minutes, hours or days, with three digits."""
    seconds = days * 24 * 3600
    if seconds < 1:
        return "less than a second"
    for unit, length, most in (("seconds", 1, 60), ("minutes", 60, 60), ("hours", 3600, 48)):
        if seconds < most * length:
            return f"{rounded(seconds / length)} {unit}"
    return f"{rounded(days)} days"


def rounded(number: float) -> str:
    """Writes a number with three digits that count, and separators: 0.0123, 12.3, 19,700."""
    short = float(f"{number:.3g}")
    return f"{short:,.0f}" if abs(short) >= 100 else f"{short:.3g}"


def table(found: Found, price: float | None = None) -> str:
    """Writes the fastest plans of a search as a table.

    Args:
        found: result of the search.
        price: price of a GPU for an hour; None leaves the price out.
    """
    head = f"{'strategy':<9}{'recompute':<11}{'images':>7}{'passes':>7}{'group':>7}"
    head += f"{'GiB':>9}{'img/s':>10}{'MFU %':>8}{'time':>20}"
    head += "" if price is None else f"{'price':>18}"
    lines = [f"{len(found.fitting)} of {found.tried} configurations fit", "", head]
    for plan in found.fitting[:SHOWN]:
        batch, layout = plan.batch, plan.layout
        paid = "" if price is None else money(plan.gpu_hours * price)
        lines.append(
            f"{plan.strategy:<9}{plan.activation_checkpointing:<11}"
            f"{batch.micro_batch_size:>7}{batch.gradient_accumulation:>7}"
            f"{layout.group_ranks(layout.sync_bn_group_size):>7}"
            f"{plan.memory.gib()['total']:>9.1f}{rounded(plan.images_per_second):>10}"
            f"{100 * plan.mfu:>8.1f}{duration(plan.days):>20}{paid:>18}".rstrip()
        )
    return "\n".join(lines)


def advice(found: Found, more: Plan | None, price: float | None = None) -> str:
    """Says what fits instead of a plan that does not fit.

    Args:
        found: result of the search on the same hardware.
        more: plan of the same kind on enough nodes, if the search found nothing.
        price: price of a GPU for an hour; None leaves the price out.
    """
    if found.fitting:
        best = found.fitting[0]
        lines = [
            f"the fastest configuration that fits: {best.strategy}, "
            f"activation_checkpointing={best.activation_checkpointing}, "
            f"{in_images(best.batch.micro_batch_size)} a rank, "
            f"{in_micro_batches(best.batch.gradient_accumulation)} a step "
            f"({best.memory.total / GIB:.1f} GiB)",
            cost(best, price),
            *[f"note: {note}" for note in best.notes],
            best.command,
        ]
        return "\n".join(lines)
    least = found.nearest
    text = "nothing fits here"
    if least is not None:
        text += (
            f": the least is {least.memory.gib()['total']:.1f} GiB, with {least.strategy}, "
            f"activation_checkpointing={least.activation_checkpointing} and "
            f"{in_images(least.batch.micro_batch_size)} a rank, "
            f"{least.missing_gib:.1f} GiB too much"
        )
    if more is not None:
        count = more.layout.nodes
        nodes = "1 node" if count == 1 else f"{count:,} nodes"
        text += f"; {more.strategy} with full recomputation fits {nodes} of this kind"
    return text
