"""Measures a step of seer_256gf on one GPU with each option, and a plain torch loop beside it.

    make bench-gpu
    python benchmarks/bench_gpu.py [--budget SECONDS] [--write]

Ends within eight minutes: rows that had no time are 'not measured'. Every row builds its own model,
since two do not fit. The plain loop runs first and last, so that a GPU that slows down is seen.
`--write` puts the results into benchmarks/results/ and docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import sys
import time
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
from seer_scale.distributed.ports import free_port
from seer_scale.models import build_model, initialise
from seer_scale.performance.cuda_allocator import let_segments_grow
from seer_scale.train import build

COMMAND = "make bench-gpu"
DOCUMENT = record.ROOT / "docs" / "performance.md"
BUDGET_S = 440.0  # no row starts later; a started row is finished
PLAIN = "plain torchvision loop"
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


def row(
    name: str, trunk: str, batch: int, choice: dict[str, Any] | None, device: torch.device
) -> Row:
    """Measures one way to train, or says why it was not possible."""
    argv = arguments(trunk, batch, choice or {}, plain=choice is None)
    config = parse(argv, recipes=record.ROOT / "launch" / "recipes", ranks=1).config
    images = [
        torch.randn(count * batch, 3, size, size, device=device)
        for count, size in ((2, 160), (4, 96))
    ]
    step, problem, seconds, peak = None, "", float("nan"), float("nan")
    try:
        step = plain_step(config, device) if choice is None else our_step(config, device)
        seconds, peak = measure(step, images, warm_up=3, steps=7)
    except torch.OutOfMemoryError:
        problem = "out of memory"
    del step
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    utilisation = build.utilisation_of(config, device, None, print)
    mfu = utilisation.metrics(batch / seconds)["mfu"] if utilisation and not problem else None
    return {
        "way": name,
        "ms an image": problem or round(1e3 * seconds / batch, 2),
        "images/s": "" if problem else round(batch / seconds, 1),
        "MFU": "" if mfu is None else f"{mfu:.1%}",
        "peak GiB": "" if problem else round(peak, 1),
    }


def describe(choice: dict[str, Any]) -> str:
    """Name of a row."""
    parts = [f"align {choice['align']}", choice["format"], f"recompute {choice['recompute']}"]
    return ", ".join([*parts, "compile"] if choice["compile"] else parts)


def main() -> int:
    """Measures rows until the time is up, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trunk", default="regnety_256gf")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument(
        "--write", action="store_true", help="write the JSON and docs/performance.md"
    )
    given = parser.parse_args()
    let_segments_grow()  # as a training does
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing is measured, nothing is written", file=sys.stderr)
        return 1
    began = time.monotonic()
    device = torch.device(given.device, 0) if given.device == "cuda" else torch.device("cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    dist.init_process_group("nccl" if given.device == "cuda" else "gloo")
    rows: list[Row] = []
    ways = [(PLAIN, None), *((describe(c), c) for c in CHOICES), (f"{PLAIN} again", None)]
    for name, choice in ways:
        last = name.endswith("again")
        if time.monotonic() - began < given.budget or last:
            rows.append(row(name, given.trunk, given.batch, choice, device))
        else:
            rows.append({**dict.fromkeys(rows[0], ""), "way": name, "ms an image": "not measured"})
        print(rows[-1], flush=True)
    dist.destroy_process_group()
    text = record.markdown(list(rows[0]), [list(r.values()) for r in rows])
    where = record.in_words(record.environment())
    text = f"{given.trunk}, 2x160+4x96, {given.batch} images, bf16. {where}.\n\n{text}"
    print(text)
    if given.write:
        record.save(
            "bench_gpu", COMMAND, {"trunk": given.trunk, "batch": given.batch, "rows": rows}
        )
        record.put_into(DOCUMENT, "bench gpu", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
