"""Checks on this machine's GPUs what a CPU cannot show, and every strategy against plain torch.

    make gpu-check
    python benchmarks/gpu_check.py [--cases CASE ...] [--minutes MINUTES]

First come the cases of benchmarks/gpu_cases.py: BatchNorm of every layout, group and size, pinned
memory, records of what went wrong, steps that must not count, timeouts; each group of them ends
within five minutes.

Cases and plain loop of the matrix are those of harness/parity.py: every strategy against plain
torch on the same GPU; low precision is compared with the same loop in float32. One process per GPU,
nccl; one GPU is enough, and what needs more is skipped with the reason. One line per case; what is
not done after `--minutes` is skipped (`make gpu-check MINUTES=10`). On a machine without a GPU it
says so and ends. Results go into benchmarks/results/.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone works without installing the package
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes sums equal from run to run

import torch  # noqa: E402
from torch.multiprocessing.spawn import (  # noqa: E402
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from benchmarks import record  # noqa: E402
from benchmarks.gpu_cases import MINUTES, too_little_memory  # noqa: E402
from benchmarks.gpu_rows import EXTRAS, Row, Variant, figures, report  # noqa: E402
from harness import parity  # noqa: E402
from seer_scale import distributed  # noqa: E402
from seer_scale.distributed.gpus import unused_gpus  # noqa: E402
from seer_scale.errors import ConfigError  # noqa: E402
from seer_scale.performance.cuda_allocator import let_segments_grow  # noqa: E402
from seer_scale.performance.gpu_start import start_gpu  # noqa: E402
from seer_scale.train.build_engine import check_run  # noqa: E402

COMMAND = "make gpu-check"
SECONDS = 1500  # per case with all variants; offload to NVMe takes minutes
EXTRA_SECONDS = 300
BUDGET_MINUTES = 30.0
NO_END = "no end after"
# Largest relative difference of a step's loss and, in float32, of parameters and buffers too.
# fp32: sums in another order, as on CPU. Low precision: CPU runs differ by 0.002 (bf16); a loss
# scale that starts too high skips the first steps.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "amp-o1": 5e-2, "apex-o1": 5e-2}
CASES = parity.CASES | parity.GPU_CASES
MODULES = {"zero": "deepspeed", "fairscale": "fairscale"}


def variants(cases: Sequence[str]) -> list[list[Variant]]:
    """Lists the variants case by case; NVMe is slow: last, and in float32 only."""
    found = []
    for case in sorted(cases, key=lambda name: "nvme" in name):
        kinds = [Variant(case), Variant(case, "full")]
        if "nvme" not in case:
            kinds += [Variant(case, precision="bf16"), Variant(case, precision="amp-o1")]
        if case in ("ddp", "zero0"):
            kinds.append(Variant(case, precision="apex-o1"))
        if case == "ddp":
            kinds.append(Variant(case, syncbn="apex"))
        found.append(kinds)
    return found


def extra_variants() -> list[list[Variant]]:
    """Lists the cases beside the matrix, those of one strategy in one group."""
    by_strategy = groupby(EXTRAS, lambda name: EXTRAS[name].strategy)
    return [[Variant(name) for name in names] for _, names in by_strategy]


def check(
    groups: list[list[Variant]], ranks: int, *, device: str, steps: int, minutes: float = math.inf
) -> list[Row]:
    """Runs each group of variants in processes of its own; prints the rows as they come."""
    rows: list[Row] = []
    began = time.monotonic()
    for kinds in groups:
        waiting = list(kinds)
        own = EXTRA_SECONDS if kinds[0].case in EXTRAS else SECONDS
        while waiting:
            left = began + 60 * minutes - time.monotonic()
            if left <= 0:
                why = f"no time left of {minutes:g} minutes"
                print(f"{'skipped':8}{waiting[0].case}: {why}", flush=True)
                rows += [Row(each, "skipped", why) for each in waiting]
                break
            limit = min(own, left)
            done, trouble = launch(waiting, ranks, device=device, steps=steps, limit=limit)
            del waiting[: len(done)]
            cut_short = limit < own and (trouble or "").startswith(NO_END)
            if cut_short:
                pass  # skipped by the next turn
            elif waiting:  # the ranks are gone: new ones train the other variants
                done.append(Row(waiting.pop(0), "failed", trouble or "it ended without a result"))
            elif trouble:
                done[-1] = replace(done[-1], status="failed", why=trouble)
            for row in done:
                print(f"{row.status:8}{row.variant} {figures(row)}", flush=True)
            rows += done
    return rows


def launch(
    waiting: list[Variant], ranks: int, *, device: str, steps: int, limit: float
) -> tuple[list[Row], str | None]:
    """Rows of the variants that ended in `limit` seconds, and what stopped the next one, if any."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port, path = probe.getsockname()[1], Path(folder) / "rows.jsonl"
        probe.close()
        path.touch()
        trouble = None
        context = start_processes(  # type: ignore[no-untyped-call]
            work, (ranks, port, waiting, device, steps, path), nprocs=ranks, join=False
        )
        deadline = time.monotonic() + limit
        try:
            while not context.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    trouble = f"{NO_END} {limit:.0f} s"
                    break
        except (ProcessRaisedException, ProcessExitedException) as error:
            trouble = str(error).strip()
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [Row(**{**row, "variant": Variant(**row["variant"])}) for row in rows], trouble


def work(
    rank: int, ranks: int, port: int, waiting: list[Variant], device: str, steps: int, path: Path
) -> None:
    """Trains the variants one after the other on one rank; rank 0 compares and writes rows."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # otherwise the process group would use nccl
        torch.set_num_threads(1)
    let_segments_grow()  # as a training does
    if warning := start_gpu():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    where = distributed.init(MINUTES)
    matrix = any(variant.case in CASES for variant in waiting)
    plain = parity.plain_loop(steps, device=device) if rank == 0 and matrix else None
    for variant in waiting:
        began = time.perf_counter()
        if why := reason_to_skip(variant, cuda=device == "cuda"):
            row = Row(variant, "skipped", why)
        elif variant.case in EXTRAS:
            row = answered(variant, EXTRAS[variant.case].run(where))
        else:
            trained = parity.train(
                variant.case, variant.checkpointing, steps, str(where), **sections(variant)
            )
            row = compared(variant, trained, plain) if plain else Row(variant, "ok")
        if rank == 0:
            row = replace(row, seconds=round(time.perf_counter() - began, 1))
            with path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    distributed.shutdown()


def answered(variant: Variant, wrong: str | None) -> Row:
    """Puts together what every rank found wrong; every rank calls this."""
    said = distributed.gather_lists([f"rank {distributed.rank()}: {wrong}"] if wrong else [])
    return Row(variant, "failed" if said else "ok", "; ".join(said))


def sections(variant: Variant) -> dict[str, dict[str, Any]]:
    """Sections that a variant changes in the configuration of its case."""
    train = {"precision": variant.precision}
    return {"train": train, "sharding": {"syncbn": variant.syncbn}}


def reason_to_skip(variant: Variant, *, cuda: bool) -> str | None:
    """Reason why a variant cannot run on this machine; None if it can."""
    name: str | None = variant.case
    if extra := EXTRAS.get(variant.case):
        if extra.gib and (why := too_little_memory(extra.gib)):
            return why
        name = extra.strategy
    if name is None:
        return None
    case, ranks = CASES[name], distributed.world_size()
    module = MODULES.get(case.strategy)
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if case.strategy == "hsdp" and ranks < case.world_size:
        return f"needs {case.world_size} ranks and there are {ranks}"
    changes = sections(variant)
    config = parity.configuration(case, variant.checkpointing, **changes)
    with tempfile.TemporaryDirectory() as nvme:
        try:
            check_run(
                config,
                parity.ds_config(case, config, nvme),
                world_size=ranks,
                local_world_size=distributed.local_world_size(),
                cuda=cuda,
            )
        except ConfigError as error:
            return str(error)
    return None


def compared(variant: Variant, trained: parity.Result, plain: parity.Result) -> Row:
    """Compares a training with the plain loop in float32."""
    parameters, buffers = parity.worst_tensor(trained.tensors, plain.tensors)
    differences = {
        "loss": parity.worst_loss(trained.losses, plain.losses),
        "parameters": parameters,
        "buffers": buffers,
    }
    skipped = sum(not math.isfinite(norm) for norm in trained.norms)
    bound = TOLERANCE[variant.precision]
    exact = variant.precision == "fp32"
    wrong = [
        f"{name} {value:.2e} > {bound:.0e}"
        for name, value in differences.items()
        if (exact or name == "loss") and not value <= bound
    ]
    if skipped == len(trained.norms):
        wrong.append("every step was skipped")
    status: Literal["ok", "failed"] = "failed" if wrong else "ok"
    return Row(variant, status, "; ".join(wrong), differences, skipped)


# ------------------------------------------------------------------------------- the command


def usable_ranks(gpus: int) -> int:
    """Largest number of GPUs that divides the batch of the matrix."""
    return max(n for n in range(1, gpus + 1) if parity.BATCH % n == 0)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--steps", type=int, default=parity.STEPS)
    parser.add_argument("--minutes", type=float, default=BUDGET_MINUTES)
    options = parser.parse_args()
    reason = unused_gpus()
    if not torch.cuda.is_available():
        here = reason or "no CUDA GPU here"
        print(f"{here}, nothing was checked; on CPU the matrix is `make parity`")
        return 1 if reason else 0
    ranks = usable_ranks(torch.cuda.device_count())
    print(f"{record.in_words(record.environment())}\n{ranks} ranks, nccl", flush=True)
    groups = extra_variants() + variants(options.cases)
    rows = check(groups, ranks, device="cuda", steps=options.steps, minutes=options.minutes)
    content = {
        "ranks": ranks,
        "steps": options.steps,
        "tolerance": TOLERANCE,
        "rows": [asdict(row) for row in rows],
    }
    print(f"kept in {record.save('gpu_check', COMMAND, content).relative_to(ROOT)}")
    return report(rows)


if __name__ == "__main__":
    sys.exit(main())
