"""The cost of reading and augmenting an image: saves `launch/data.py bench` with table and plot.

Photographs in three sizes; this loader, torchvision's transforms on Pillow and lightly's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from benchmarks import loader_rates as bench
from benchmarks import record
from benchmarks.loader_pipelines import Crops

COMMAND = "python benchmarks/loader.py"
DOCUMENT = record.ROOT / "docs" / "data.md"
PLOT = record.ROOT / "docs" / "images" / "loader.png"
PACKAGES = ("pillow", "simplejpeg", "opencv-python-headless", "lightly")
CROPS = (bench.SWAV_CROPS, "2x160+4x96")  # as SwAV was published, and RG-10B
# Times the rate of `pil`, at least.
TARGETS = {
    "host_crops": {"500x375": 6.0, "1600x1200": 7.0, "4000x3000": 10.0},
    "host_all": {"500x375": 3.0, "1600x1200": 4.0, "4000x3000": 8.0},
}
LABELS = {
    "decode": "decode alone, full size",
    "host_crops": "this loader, augmenting on the device",
    "host_all": "this loader, augmenting on the host",
    "pil": "torchvision on Pillow",
    "lightly": "its SwaVTransform",
    "dataloader_pil": "DataLoader over ImageFolder",
    "dataloader_ours": "this loader over the same folder",
}
# Okabe and Ito's colours, which the colour-blind tell apart; in print the hatches do.
COLOURS = ("#999999", "#0072b2", "#56b4e9", "#e69f00", "#f0e442", "#d55e00", "#009e73")
HATCHES = ("", "///", "\\\\\\", "...", "xxx", "ooo", "---")


def main() -> int:
    """Measures, writes JSON, tables and plot; status 1 if a target is missed with SwAV's crops."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=bench.SECONDS, help="for each row, about")
    parser.add_argument("--no-docs", action="store_true", help="leave docs/ as it is")
    options = parser.parse_args()
    sets = bench.photograph_sets()
    rows: dict[str, list[bench.Row]] = {}
    for crops in CROPS:
        rows[crops] = []
        for images in sets:
            rows[crops] += bench.measure(images, crops=Crops.parse(crops), seconds=options.seconds)
        print(f"{crops}\n{bench.table(rows[crops])}")
    content = {
        "versions": record.versions(PACKAGES),
        "bytes_per_image": {s.name: round(sum(map(len, s.files)) / len(s.files)) for s in sets},
        "rows_by_crops": {crops: [row._asdict() for row in rows[crops]] for crops in CROPS},
    }
    path = record.save("loader", COMMAND, content)
    print(f"kept in {path.relative_to(record.ROOT)}")
    if not options.no_docs:
        record.put_into(DOCUMENT, "loader", report(content))
        draw(rows[CROPS[0]])
    for crops in CROPS:
        print(crops, *targets(rows[crops]), sep="\n")
    return int(any(line.endswith("missed") for line in targets(rows[CROPS[0]])))


def targets(rows: Sequence[bench.Row]) -> list[str]:
    """A line for every target: wanted, measured, reached or missed."""
    rates = {(row.images, row.pipeline): row.images_per_second for row in rows}
    lines = []
    for pipeline, by_images in TARGETS.items():
        for images, wanted in by_images.items():
            ratio = rates[images, pipeline] / rates[images, "pil"]
            verdict = "reached" if ratio >= wanted else "missed"
            lines.append(f"{pipeline} on {images}: {ratio:.1f}x of {wanted:g}x: {verdict}")
    return lines


def report(content: dict[str, Any]) -> str:
    """The section of the docs: what was measured on what, and a table for every set of crops."""
    environment = record.environment()
    environment["versions"] |= content["versions"]
    kilobytes = ", ".join(f"{n / 1000:.0f} kB" for n in content["bytes_per_image"].values())
    tables = [
        f"Crops {crops}:\n\n{table([bench.Row(**row) for row in rows])}"
        for crops, rows in content["rows_by_crops"].items()
    ]
    return (
        f"`{COMMAND}`; {record.in_words(environment)}.\n\n"
        "Images per second and core (times the Pillow pipeline of the same kind, share of"
        f" `decode`); files of {kilobytes} on average.\n\n"
        + "\n".join(tables)
        + f"\n![Images per second and core of every pipeline, {CROPS[0]}](images/loader.png)"
    )


def table(rows: Sequence[bench.Row]) -> str:
    """Pipelines down, image sizes across."""
    rates = {(row.images, row.pipeline): row.images_per_second for row in rows}
    sizes = list(dict.fromkeys(row.images for row in rows))
    lines = []
    for pipeline, label in LABELS.items():
        if (sizes[0], pipeline) not in rates:
            continue
        base = "dataloader_pil" if pipeline.startswith("dataloader") else "pil"
        cells = []
        for images in sizes:
            rate, limit = rates[images, pipeline], rates[images, "decode"]
            cells.append(f"{rate:.1f} ({rate / rates[images, base]:.1f}x, {rate / limit:.0%})")
        lines.append([f"`{pipeline}`", label, *cells])
    return record.markdown(["pipeline", "what it is", *sizes], lines)


def draw(rows: Sequence[bench.Row]) -> None:
    """Bars in groups by image size, on a logarithmic scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axis = figure.subplots()
    sizes = list(dict.fromkeys(row.images for row in rows))
    pipelines = [name for name in bench.PIPELINES if any(row.pipeline == name for row in rows)]
    width = 0.85 / len(pipelines)
    for number, name in enumerate(pipelines):
        rates = [row.images_per_second for row in rows if row.pipeline == name]
        places = [
            group + (number - (len(pipelines) - 1) / 2) * width for group in range(len(sizes))
        ]
        kind = bench.PIPELINES.index(name)
        bars = axis.bar(
            places,
            rates,
            width,
            color=COLOURS[kind],
            hatch=HATCHES[kind],
            edgecolor="white",
            linewidth=0.5,
            label=f"{name}: {LABELS[name]}",
        )
        axis.bar_label(bars, fmt=_short, fontsize=8, padding=2)
    axis.set_yscale("log")
    axis.set_ylabel("images per second and core")
    axis.set_xticks(range(len(sizes)), [f"{size.replace('x', ' x ')} pixels" for size in sizes])
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=150)


def _short(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"


if __name__ == "__main__":
    sys.exit(main())
