"""Writes the results of `make bench-memory` into docs/sharding.md, with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import record

DOCUMENT = record.ROOT / "docs" / "sharding.md"
PLOT = record.ROOT / "docs" / "images" / "memory.png"
MIB, GIB = 2**20, 2**30
KINDS = ("parameters", "gradients", "optimizer")
# Colours of Okabe and Ito (2008) for colour-blind readers; hatches for print.
COLOURS = ("#0072b2", "#e69f00", "#009e73")
HATCHES = ("", "///", "...")
STATE = """\
![Bytes per rank under every strategy, and activations](images/memory.png)

`regnety_16gf` with its recipe's head, float32: MiB on the rank that holds most, when the gradients
of the second step are complete and the optimizer has not stepped. The formula is
`parallel/state_bytes.py`; other tensors are BatchNorm's statistics and buckets of communication.

- ZeRO steps masters of its own and copies them into the parameters, so at stages 1 to 3 a float32
  value is there twice. That is why FSDP holds less than stage 3.
- DeepSpeed's stages 1 and 2 keep the whole gradient of a tensor that reaches into a rank's
  partition. `parallel/zero.py` switches on their buffer for the partition alone. Stage 1 differs
  from stage 2 only with gradient accumulation: it reduces whole gradients once, after the last
  micro-batch.
- Stage 3 keeps tensors of up to `stage3_param_persistence_threshold` elements (1e5) whole, beside
  its slices of them, and a bucket of `reduce_bucket_size` (5e7 elements) at all times.
- Within the passes there is more: the units gathered at the time, buckets under way.
"""
ACTIVATIONS = """\
`auto:GIB` recomputes the fewest blocks whose activations fit a budget: crops, what autograd saves,
gradients of activations, autocast's copies of weights and the loss's scores, of one micro-batch.
Every block is profiled forward and backward on tensors without memory, with the run's crops and
precision, before the model is built; the choice is exact (`parallel/activation_budget.py`). A
kernel's workspace, an allocator's gaps and gathered weights are not in it: leave them room.

`regnety_16gf` on one process, float32, 8 crops of 128 pixels and 24 of 64; `auto` was given half of
what `none` takes. The peak is of bytes of tensors beside weights, gradients and momentum; time is
the processor's for the fastest of four steps, over that of `none`.
"""


def write(content: dict[str, Any]) -> None:
    """Puts both tables into docs/sharding.md and draws docs/images/memory.png."""
    source = f"`make bench-memory`; {record.in_words(record.environment())}."
    state, activations = content["state"], content["activations"]
    record.put_into(DOCUMENT, "memory", f"{STATE}\n{source}\n\n{state_table(state)}")
    record.put_into(
        DOCUMENT, "activations", f"{ACTIVATIONS}\n{source}\n\n{activation_table(activations)}"
    )
    draw(content)


def largest(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Picks the rank that holds most, per strategy and number of ranks, in the order of rows."""
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
    """Writes a table of MiB on the rank that holds most."""
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
    """Writes a table of GiB at the peak of a step, and its time relative to no recomputation."""
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
    """Draws state per rank as stacked bars with the formula's marks, beside activations."""
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
        budget = float(mode["mode"].partition(":")[2] or 0)
        if budget:
            axis.hlines(budget, index - 0.42, index + 0.42, color="black", linewidth=1.6)
        time = mode["seconds"] / modes[0]["seconds"]
        axis.annotate(
            f"{height:.2f} GiB\n{time:.2f} x time",
            (index, max(height, budget)),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    axis.set_xticks(range(len(modes)), [mode["mode"].replace(":", ":\n") for mode in modes])
    axis.set(ylabel="GiB", title="Activations (line: the budget)", xlim=(-0.6, len(modes) - 0.4))
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.margins(y=0.18)
