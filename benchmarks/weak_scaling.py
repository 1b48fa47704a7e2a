"""Predicts the weak scaling of SEER's two largest models on H200 by the planner.

    python benchmarks/weak_scaling.py [--write]

Efficiency is the time of computing alone over the time of the step: the rest is waiting for other
ranks, and an optimizer that steps what every rank holds. Images per rank are the recipe's.
`--write` puts the table into docs/planner.md and draws docs/images/weak_scaling.png.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from benchmarks import record
from seer_scale.planner import Plan, plan
from seer_scale.planner.plan import STRATEGIES

COMMAND = "python benchmarks/weak_scaling.py --write"
DOCUMENT = record.ROOT / "docs" / "planner.md"
PLOT = record.ROOT / "docs" / "images" / "weak_scaling.png"
HARDWARE, PER_NODE = "h200_141gb", 8
RANKS = tuple(2**power for power in range(3, 15))
TABLED = (8, 64, 512, 2048, 16_384)
RECIPES = ("seer_256gf", "seer_rg10b")
GROUPS = (8, 64, 512, 0)  # ranks; 0 means all
FIXED_GROUP = 8  # ranks of a node; strategies are compared with this group
FIXED_STRATEGY = {"seer_256gf": "ddp", "seer_rg10b": "hsdp"}
# Colours of Okabe and Ito (2008) for colour-blind readers; markers for print.
COLOURS = ("#000000", "#0072b2", "#56b4e9", "#999999", "#e69f00", "#d55e00", "#009e73")
MARKERS = ("o", "s", "D", "x", "^", "v", "P")


@dataclass(frozen=True)
class Point:
    """A prediction for a number of GPUs.

    Attributes:
        ranks: number of GPUs.
        efficiency: time of computing alone over the time of the step.
        fits: whether the memory of a rank is enough.
        images_per_second: images per second of one rank.
    """

    ranks: int
    efficiency: float
    fits: bool
    images_per_second: float


def point(recipe: str, strategy: str, group: int, ranks: int) -> Point:
    """Makes a prediction; a group larger than the world is the world."""
    found: Plan = plan(
        recipe,
        HARDWARE,
        nodes=ranks // PER_NODE,
        gpus_per_node=PER_NODE,
        strategy=strategy,
        overrides=[
            f"sharding.sync_bn_group_size={0 if group >= ranks else group}",
            "train.gradient_accumulation=1",  # the recipe's images per rank, on any number of them
        ],
    )
    time = found.time
    computing = time.forward + time.backward + time.recompute + time.memory_bound
    each = found.images_per_second / ranks
    return Point(ranks, computing / time.total, found.fits, each)


def curves(recipe: str) -> dict[str, dict[str, list[Point]]]:
    """Predicts curves by strategy at one group, and by group at one strategy."""
    fixed = FIXED_STRATEGY[recipe]
    return {
        "strategies": {
            name: [point(recipe, name, FIXED_GROUP, ranks) for ranks in RANKS]
            for name in STRATEGIES
        },
        "groups": {
            str(group or "all"): [point(recipe, fixed, group, ranks) for ranks in RANKS]
            for group in GROUPS
        },
    }


def table(found: dict[str, dict[str, dict[str, list[Point]]]]) -> str:
    """Writes a table of efficiencies in per cent, in brackets where the memory is too small."""
    rows = []
    for recipe, kinds in found.items():
        for kind, by_name in kinds.items():
            for name, points in by_name.items():
                cells = [p for p in points if p.ranks in TABLED]
                label = name if kind == "strategies" else f"{FIXED_STRATEGY[recipe]}, group {name}"
                shown = [f"{100 * p.efficiency:.1f}" for p in cells]
                shown = [s if p.fits else f"({s})" for s, p in zip(shown, cells, strict=True)]
                rows.append([f"`{recipe}`", label, *shown])
    return record.markdown(["recipe", "", *[f"{ranks:,}" for ranks in TABLED]], rows)


def crossings(recipe: str, by_name: dict[str, list[Point]]) -> list[str]:
    """Says at which number of GPUs another strategy becomes the fastest that fits."""
    lines: list[str] = []
    best = ""
    for index, ranks in enumerate(RANKS):
        fitting = {name: points[index] for name, points in by_name.items() if points[index].fits}
        if not fitting:
            continue
        top = max(point.efficiency for point in fitting.values())
        # Another strategy is mentioned only if it is better by more than 1 %.
        if best in fitting and fitting[best].efficiency > top - 0.01:
            continue
        best = max(fitting, key=lambda name: fitting[name].efficiency)
        lines.append(
            f"- `{recipe}`, from {ranks:,} GPUs on: `{best}`, {100 * top:.1f} % "
            f"({fitting[best].images_per_second:.1f} images/s per GPU)."
        )
    return lines


def draw(found: dict[str, dict[str, dict[str, list[Point]]]]) -> None:
    """Draws strategies on the left, SyncBatchNorm groups on the right; hollow marks do not fit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for row, (recipe, kinds) in zip(axes, found.items(), strict=True):
        _draw(row[0], kinds["strategies"], f"{recipe}: strategies, groups of {FIXED_GROUP}")
        _draw(row[1], kinds["groups"], f"{recipe}: groups, {FIXED_STRATEGY[recipe]}")
        row[0].set_ylabel("efficiency, %")
    for axis in axes[1]:
        axis.set_xlabel("H200 GPUs, eight per node")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=150)


def _draw(axis: Any, by_name: dict[str, list[Point]], title: str) -> None:
    lowest = 100.0
    for (name, points), colour, marker in zip(by_name.items(), COLOURS, MARKERS, strict=False):
        ranks = [p.ranks for p in points]
        percent = [100 * p.efficiency for p in points]
        lowest = min(lowest, *percent)
        axis.plot(ranks, percent, color=colour, linewidth=1.4)
        axis.plot([], [], color=colour, linewidth=1.4, marker=marker, label=name)
        for fits in (True, False):
            chosen = [(r, y) for r, y, p in zip(ranks, percent, points, strict=True)
                      if p.fits is fits]  # fmt: skip
            face = colour if fits or marker == "x" else "white"
            axis.scatter(*zip(*chosen, strict=True), marker=marker, s=30, color=colour,
                         facecolors=face, zorder=3) if chosen else None  # fmt: skip
    axis.set_xscale("log", base=2)
    shown = RANKS[::2]
    axis.set_xticks(shown, [f"{ranks:,}" for ranks in shown])
    axis.set(title=title, ylim=(min(80.0, 5 * (lowest // 5)), 101))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower left", frameon=False, fontsize=9)


def main() -> int:
    """Prints the table; --write also puts table and plot into docs/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write into docs/")
    options = parser.parse_args()
    found = {recipe: curves(recipe) for recipe in RECIPES}
    lines = [line for recipe in RECIPES for line in crossings(recipe, found[recipe]["strategies"])]
    text = f"{table(found)}\n" + "\n".join(lines)
    print(text)
    if options.write:
        draw(found)
        record.put_into(DOCUMENT, "weak-scaling", f"`{COMMAND}`.\n\n{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
