"""Measures a step of seer_256gf on one GPU with each option, and a plain torch loop beside it.

    make bench-gpu
    python benchmarks/bench_gpu.py [--budget SECONDS] [--write]

Ends within eight minutes: a row that would not fit is 'not measured', one that does not end ends
the command, and one that fails says why. Every row builds its own model, since two do not fit. The
plain loop runs first and last, so that a GPU that slows down is seen. `--write` puts every row into
benchmarks/results/ and docs/performance.md as soon as it is measured.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import itertools
import os
import statistics
import sys
import time
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

import torch
import torch.distributed as dist

from benchmarks import peers, record
from benchmarks.train_step import our_step
from harness.engines import RECIPE
from seer_scale.config import RunConfig
from seer_scale.config.recipe import parse
from seer_scale.distributed.gpus import unused_gpus
from seer_scale.distributed.ports import free_port
from seer_scale.models import build_model, initialise
from seer_scale.performance.cuda_allocator import let_segments_grow
from seer_scale.performance.gpu_start import start_gpu
from seer_scale.train import build

COMMAND = "make bench-gpu"
DOCUMENT = record.ROOT / "docs" / "performance.md"
BUDGET_S = 470.0  # the process ends itself after this time
COMPILE_S = 120.0  # that a row with compile may take
PLAIN = "plain torchvision loop"
FAILED = "failed: "
Row = dict[str, Any]
# In the order of measurement; compile is last, since it needs a minute before its first step.
CHOICES = [
    {"align": align, "format": memory_format, "recompute": recompute, "compile": compiled}
    for compiled, recompute, memory_format, align in itertools.product(
        (False, True), ("none", "full"), ("channels_last", "contiguous"), (8, 1)
    )
]


def arguments(trunk: str, batch: int, choice: dict[str, Any], plain: bool = False) -> list[str]:
    """Arguments for a run of the recipe's model at 2x160+4x96 pixels in bf16."""
    heads, prototypes = ("[8192,8192,256]", 16_000) if trunk.endswith("gf") else ("[32,16]", 64)
    return [
        *("--recipe", RECIPE, "run.dir=unused", "data.path=unused", "tracking.enabled=false"),
        *("sharding.sync_bn_group_size=0", f"model.prototypes={prototypes}"),
        *(f"model.trunk={trunk}", f"model.head_dims={heads}", "model.head_batch_norm=false"),
        *("train.precision=bf16", f"train.micro_batch_size={batch}", "sharding.strategy=ddp"),
        *("data.crop_sizes=[160,96]", "data.crop_counts=[2,4]", "optim.larc=true"),
        *(
            []
            if plain
            else [
                f"model.align_channels={choice['align']}",
                f"train.memory_format={choice['format']}",
                f"train.compile={str(choice['compile']).lower()}",
                f"sharding.activation_checkpointing={choice['recompute']}",
            ]
        ),
    ]


def plain_step(config: RunConfig, device: torch.device) -> peers.Step:
    """Builds the plain step; torchvision has no 256 GF, so its RegNet takes SEER's numbers."""
    with torch.device(device):
        model = build_model(
            config.model.trunk,
            head_dims=config.model.head_dims,
            head_batch_norm=False,
            prototypes=config.model.prototypes,
        )
        initialise(model, 0)
    step, _ = peers.plain_step(model, config.model.trunk, crops=6, autocast=True)
    return step


def measure(step: peers.Step, images: Any, warm_up: int, steps: int) -> tuple[float, float]:
    """Measures the median seconds of a step and the peak of allocated GiB."""
    cuda = images[0].is_cuda
    for _ in range(warm_up):
        step(images)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(steps):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        step(images)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    return statistics.median(seconds), peak


def not_measured(name: str) -> Row:
    """Row of a way that had no time."""
    empty = {"images/s": "", "MFU": "", "peak GiB": ""}
    return {"way": name, "ms an image": "not measured", **empty}


def row(
    name: str, trunk: str, batch: int, choice: dict[str, Any] | None, device: torch.device
) -> Row:
    """Measures one way to train, or says why it was not possible."""
    try:
        gc.collect()  # what the row before has left
        if device.type == "cuda":
            torch.cuda.empty_cache()
        argv = arguments(trunk, batch, choice or {}, plain=choice is None)
        config = parse(argv, recipes=record.ROOT / "launch" / "recipes", ranks=1).config
        images = [
            torch.randn(count * batch, 3, size, size, device=device)
            for count, size in ((2, 160), (4, 96))
        ]
        step = plain_step(config, device) if choice is None else our_step(config, device)
        seconds, peak = measure(step, images, warm_up=3, steps=7)
        utilisation = build.utilisation_of(config, device, None, print)
        mfu = utilisation.metrics(batch / seconds)["mfu"] if utilisation else None
    except torch.OutOfMemoryError:
        return {**not_measured(name), "ms an image": "out of memory"}
    except Exception as error:  # the other rows are worth their time
        traceback.print_exc()
        said = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].replace("|", "/")
        return {**not_measured(name), "ms an image": FAILED + said[:120]}
    return {
        "way": name,
        "ms an image": round(1e3 * seconds / batch, 2),
        "images/s": round(batch / seconds, 1),
        "MFU": "" if mfu is None else f"{mfu:.1%}",
        "peak GiB": round(peak, 1),
    }


def fits(left: float, taken: list[float], choice: dict[str, Any] | None) -> bool:
    """Whether a row fits into the seconds left, with the plain loop that comes last.

    Args:
        left: seconds until the process ends itself.
        taken: seconds of the rows so far, the plain loop's first.
        choice: options of the row; None for the plain loop.
    """
    if not taken:
        return True
    if choice is None:
        return taken[0] < left
    return max(*taken, COMPILE_S if choice["compile"] else 0.0) + taken[0] < left


def describe(choice: dict[str, Any]) -> str:
    """Name of a row."""
    parts = [f"align {choice['align']}", choice["format"], f"recompute {choice['recompute']}"]
    return ", ".join([*parts, "compile"] if choice["compile"] else parts)


def table(trunk: str, batch: int, rows: list[Row]) -> str:
    """Writes the rows with what they depend on."""
    where = record.in_words(record.environment())
    cells = record.markdown(list(rows[0]), [list(row.values()) for row in rows])
    return f"{trunk}, 2x160+4x96, {batch} images, bf16. {where}.\n\n{cells}"


def keep(trunk: str, batch: int, rows: list[Row]) -> None:
    """Writes the rows into benchmarks/results/ and docs/performance.md."""
    record.save("bench_gpu", COMMAND, {"trunk": trunk, "batch": batch, "rows": rows})
    record.put_into(DOCUMENT, "bench gpu", table(trunk, batch, rows))


def main() -> int:
    """Measures rows while there is time, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", default="regnety_256gf")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--write", action="store_true", help="write the JSON and docs/performance.md"
    )
    given = parser.parse_args()
    cuda = given.device == "cuda"
    reason = unused_gpus() if cuda else None
    if cuda and not torch.cuda.is_available():
        print(f"{reason or 'no GPU here'}, nothing was measured", file=sys.stderr)
        return 1
    began = time.monotonic()
    faulthandler.dump_traceback_later(given.budget, exit=True)
    if cuda:
        let_segments_grow()  # as a training does
        if warning := start_gpu():
            print(f"warning: {warning}", file=sys.stderr, flush=True)
    device = torch.device(given.device, 0) if cuda else torch.device("cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("nccl" if cuda else "gloo")
    ways = [(PLAIN, None), *((describe(c), c) for c in CHOICES), (f"{PLAIN} again", None)]
    rows = [not_measured(name) for name, _ in ways]
    taken: list[float] = []
    for index, (name, choice) in enumerate(ways):
        started = time.monotonic()
        if fits(began + given.budget - started, taken, choice):
            rows[index] = row(name, given.trunk, given.batch, choice, device)
            taken.append(time.monotonic() - started)
            if given.write:
                keep(given.trunk, given.batch, rows)
        print(rows[index], flush=True)
    dist.destroy_process_group()
    print(table(given.trunk, given.batch, rows))
    return 1 if any(str(row["ms an image"]).startswith(FAILED) for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
