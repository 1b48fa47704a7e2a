"""Compares planned times and memory with published figures.

    python benchmarks/plan_literature.py [--write]

One constant, the efficiency of the V100, is fitted to one figure; every other line is a prediction.
`--write` puts the table into docs/planner.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from benchmarks import record
from seer_scale.performance.hardware import load_hardware
from seer_scale.planner import Plan, plan

COMMAND = "python benchmarks/plan_literature.py --write"
DOCUMENT = record.ROOT / "docs" / "planner.md"
GIB, GB = 2**30, 1e9
SEER_MS, SEER_BATCH, SEER_STEPS = 6125.0, 8704, 114_890
# As published: six crops padded to 160 pixels in one pass.
PADDED = ("data.crop_sizes=[160]", "data.crop_counts=[6]")
FULL = ("sharding.activation_checkpointing=full", "sharding.checkpoint_groups=null")
# Nearly half of the 18 blocks: stages 1 and 2 have six; keys cannot name exactly nine.
HALF = ("sharding.activation_checkpointing=groups", "sharding.checkpoint_groups=[[2],[4],[],[]]")


@dataclass(frozen=True)
class Line:
    """A published figure beside the planner's.

    Attributes:
        what: description of the figure.
        published: published figure with its unit.
        predicted: planned figure with its unit.
        off: deviation of the prediction, in words.
    """

    what: str
    published: str
    predicted: str
    off: str


def against(what: str, published: float, predicted: float, unit: str, digits: int = 0) -> Line:
    """Makes a line of two numbers."""
    off = f"{100 * (predicted / published - 1):+.0f} %"
    return Line(what, f"{published:,.{digits}f} {unit}", f"{predicted:,.{digits}f} {unit}", off)


def seer() -> Plan:
    """Plans SEER's timed run: 64 nodes of 8 V100, 17 images each."""
    return plan(
        "seer_256gf",
        "v100_32gb",
        nodes=64,
        gpus_per_node=8,
        strategy="ddp",
        overrides=["train.micro_batch_size=17"],
        images=SEER_STEPS * SEER_BATCH,
    )


def fitted_efficiency(run: Plan) -> float:
    """Share of the peak at which the planned step of SEER takes the published time."""
    computing = run.time.forward + run.time.backward + run.time.recompute
    return run.hardware.efficiency * computing / (SEER_MS / 1e3 - run.time.total + computing)


def seer_lines(run: Plan) -> list[Line]:
    """Lines of the run that the constant is fitted to."""
    return [
        Line("SEER 256GF, ms of a step", f"{SEER_MS:,.0f}", f"{1e3 * run.time.total:,.0f}", "fit"),
        against("SEER 256GF, days for 1e9 images ('8 days')", 8.0, run.days, "d", 2),
        fits("SEER 256GF, 17 images on a V100 of 32 GB", "fits", run),
    ]


def fits(what: str, published: str, run: Plan) -> Line:
    """Makes a line that says whether a run fits."""
    gib = f"{run.memory.gib()['total']:.1f} of {run.hardware.usable_gib:.1f} GiB"
    predicted = "fits" if run.fits else "does not fit"
    agrees = "agrees" if predicted == published else "differs"
    return Line(what, published, f"{predicted}: {gib}", agrees)


def sixteen_gf(more: Sequence[str]) -> Plan:
    """Plans RegNetY-16GF with 16 images a rank, on a node of eight V100."""
    return plan(
        "swav_in1k_regnety_16gf",
        "v100_32gb",
        nodes=1,
        gpus_per_node=8,
        strategy="ddp",
        overrides=["train.micro_batch_size=16", *more],
    )


def checkpointing_lines() -> list[Line]:
    """Lines of VISSL's figures for the savings and the cost of recomputation."""
    kept, half, full = sixteen_gf([]), sixteen_gf(HALF), sixteen_gf(FULL)
    gb = [run.memory.total / GB for run in (kept, half, full)]
    name = "RegNetY-16GF, 16 images"
    return [
        against(f"{name}, ms of a batch", 390, 1e3 * kept.time.total, "ms"),
        against(f"{name}, ms of a batch, recomputing", 450, 1e3 * half.time.total, "ms"),
        against(f"{name}, GB", 5.9, gb[0], "GB", 1),
        against(f"{name}, GB, recomputing", 3.5, gb[1], "GB", 1),
        Line(
            f"{name}, time of recomputing",
            "+15 %",
            f"+{100 * (half.time.total / kept.time.total - 1):.0f} %, every block "
            f"+{100 * (full.time.total / kept.time.total - 1):.0f} %",
            "see above",
        ),
        Line(
            f"{name}, memory of recomputing",
            f"{3.5 / 5.9:.2f} x",
            f"{gb[1] / gb[0]:.2f} x, every block {gb[2] / gb[0]:.2f} x",
            "see above",
        ),
    ]


def rg10b(nodes: int, gpus: int, strategy: str, images: int, *more: str, **other: str) -> Plan:
    """Plans RG-10B, on A100 of 40 GB unless `hardware` names others."""
    return plan(
        "seer_rg10b",
        other.get("hardware", "a100_40gb"),
        nodes=nodes,
        gpus_per_node=gpus,
        strategy=strategy,
        overrides=[f"train.micro_batch_size={images}", "sharding.sync_bn_group_size=0", *more],
    )


def rg10b_lines() -> list[Line]:
    """Lines of RG-10B's memory: as published, and under the strategies of this trainer."""
    large, test = "RG-10B, 496 A100 x 16 images", "V100 of 32 GB x 4 images"
    eight = rg10b(1, 8, "fsdp", 4, *PADDED, hardware="v100_32gb")
    four = rg10b(1, 4, "fsdp", 4, *PADDED, hardware="v100_32gb")
    return [
        fits(f"{large}, `fsdp`, padded", "fits", rg10b(62, 8, "fsdp", 16, *PADDED)),
        fits(f"RG-10B, 8 {test} (VISSL's test), `fsdp`, padded", "fits", eight),
        fits(f"RG-10B, 4 {test} ('8 are needed'), `fsdp`, padded", "does not fit", four),
        fits(f"{large}, `zero3`", "fits", rg10b(62, 8, "zero3", 16)),
        fits(f"{large}, `fsdp`, `full`", "fits", rg10b(62, 8, "fsdp", 16, *FULL)),
        fits(f"{large}, `fsdp`, the recipe's groups", "fits", rg10b(62, 8, "fsdp", 16)),
        fits("RG-10B, 8 A100 x 4 images, `zero3`", "fits", rg10b(1, 8, "zero3", 4)),
        fits("RG-10B, 4 A100 x 4 images, `zero3`", "does not fit", rg10b(1, 4, "zero3", 4)),
    ]


def main() -> int:
    """Prints the table; returns 1 if the profile's efficiency differs from the fitted one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write into docs/planner.md")
    options = parser.parse_args()
    run = seer()
    fitted, stated = fitted_efficiency(run), load_hardware("v100_32gb").efficiency
    print(f"efficiency fitted on SEER's step: {fitted:.4f}, in the profile: {stated}")
    lines = [*seer_lines(run), *checkpointing_lines(), *rg10b_lines()]
    rows = [[line.what, line.published, line.predicted, line.off] for line in lines]
    text = record.markdown(["", "published", "predicted", "off"], rows)
    print(text)
    if options.write:
        record.put_into(DOCUMENT, "literature", f"`{COMMAND}`.\n\n{text}")
    return 1 if abs(fitted / stated - 1) > 0.02 else 0


if __name__ == "__main__":
    sys.exit(main())
