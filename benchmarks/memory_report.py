"""What `make bench-memory` has measured as tables and a plot in docs/."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import record

DOCUMENT = record.ROOT / "docs" / "sharding.md"
PLOT = record.ROOT / "docs" / "images" / "memory.png"
MIB, GIB = 2**20, 2**30
KINDS = ("parameters", "gradients", "optimizer")
# Okabe and Ito's colours, which the colour-blind tell apart; in print the hatches do.
COLOURS = ("#0072b2", "#e69f00", "#009e73")
HATCHES = ("", "///", "...")


def write(content: dict[str, Any]) -> None:
    """Puts both tables into docs/sharding.md and draws docs/images/memory.png."""
    source = f"`make bench-memory`; {record.in_words(record.environment())}."
    record.put_into(DOCUMENT, "memory", f"{source}\n\n{state_table(content['state'])}")
    record.put_into(
        DOCUMENT, "activations", f"{source}\n\n{activation_table(content['activations'])}"
    )
    draw(content)


def largest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every strategy and number of ranks the rank that holds most, in the order of the rows."""
    most: dict[tuple[str, int], dict[str, Any]] = {}
    for row in rows:
        key = (row["strategy"], row["ranks"])
        if key not in most or total(row["measured"]) > total(most[key]["measured"]):
            most[key] = row
    return list(most.values())


def total(held: dict[str, float]) -> float:
    """Bytes of all kinds."""
    return sum(held[kind] for kind in KINDS)


def state_table(rows: Sequence[dict[str, Any]]) -> str:
    """MiB on the rank that holds most."""
    lines = []
    for row in largest(rows):
        measured, expected = row["measured"], row["expected"]
        off = total(measured) / total(expected) - 1
        cells = [*[measured[kind] for kind in KINDS], total(measured), total(expected)]
        lines.append(
            [
                row["strategy"],
                row["ranks"],
                *[f"{cell / MIB:.1f}" for cell in cells],
                f"{100 * off:+.2f} %",
                f"{row['rest'] / MIB:.1f}",
            ]
        )
    head = ["strategy", "ranks", *KINDS, "sum", "formula", "difference", "other tensors"]
    return record.markdown(head, lines)


def activation_table(modes: Sequence[dict[str, Any]]) -> str:
    """GiB at the peak of a step, and its time relative to no recomputation."""
    lines = [
        [
            f"`{mode['mode']}`",
            mode["recomputed"],
            f"{mode['peak'] / GIB:.3f}",
            f"{mode['profiled'] / GIB:.3f}",
            f"{mode['peak'] / modes[0]['peak']:.2f}",
            f"{mode['seconds'] / modes[0]['seconds']:.2f}",
        ]
        for mode in modes
    ]
    head = ["mode", "blocks recomputed", "GiB measured", "GiB profiled", "of none", "step time"]
    return record.markdown(head, lines)


def draw(content: dict[str, Any]) -> None:
    """State per rank as stacked bars with the formula's marks; activations beside them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[3, 1])
    _draw_state(left, largest(content["state"]))
    _draw_activations(right, content["activations"])
    PLOT.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PLOT, dpi=150)


def _draw_state(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(row["strategy"] for row in rows))
    places: list[float] = []
    labels: list[str] = []
    position = 0.0
    for name in names:
        first = position
        for row in (row for row in rows if row["strategy"] == name):
            bottom = 0.0
            for kind, colour, hatch in zip(KINDS, COLOURS, HATCHES, strict=True):
                height = row["measured"][kind] / GIB
                axis.bar(
                    position,
                    height,
                    bottom=bottom,
                    color=colour,
                    hatch=hatch,
                    edgecolor="white",
                    linewidth=0.5,
                    label=None if places else kind,
                )
                bottom += height
            expected = total(row["expected"]) / GIB
            label = None if places else "formula"
            axis.hlines(
                expected,
                position - 0.48,
                position + 0.48,
                color="black",
                linewidth=1.6,
                label=label,
            )
            places.append(position)
            labels.append(str(row["ranks"]))
            position += 1
        axis.text(
            (first + position - 1) / 2,
            -0.1,
            name,
            ha="center",
            va="top",
            transform=axis.get_xaxis_transform(),
        )
        position += 0.7
    axis.set_xticks(places, labels)
    axis.set(ylabel="GiB per rank", title="Weights, gradients and optimizer on 1, 2 and 4 ranks")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.legend(ncols=4, loc="upper left", frameon=False)
    axis.margins(y=0.16)


def _draw_activations(axis: Any, modes: Sequence[dict[str, Any]]) -> None:
    for index, mode in enumerate(modes):
        height = mode["peak"] / GIB
        axis.bar(index, height, color="#cc79a7", width=0.6)
        time = mode["seconds"] / modes[0]["seconds"]
        text = f"{height:.2f} GiB\n{time:.2f} x time"
        axis.text(index, height, text, ha="center", va="bottom", fontsize=9)
        budget = mode["mode"].partition(":")[2]
        if budget:
            axis.hlines(float(budget), index - 0.42, index + 0.42, color="black", linewidth=1.6)
    axis.set_xticks(range(len(modes)), [mode["mode"].replace(":", ":\n") for mode in modes])
    axis.set(ylabel="GiB", title="Activations of a micro-batch")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.margins(y=0.18)
