"""`make gpu-check`: the parity matrix on this machine's GPUs, as a table and a JSON.

Cases and oracle are those of harness/parity.py: every strategy against a plain loop in plain
torch on the same GPU, then low precision against the same float32 loop. One process per GPU, nccl.
A machine without a GPU is told so. `python benchmarks/gpu_check.py` runs without installation.
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
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a clone works without installing the package
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or sums change from run to run

import torch  # noqa: E402
from torch.multiprocessing.spawn import (  # noqa: E402
    ProcessExitedException,
    ProcessRaisedException,
    start_processes,
)

from benchmarks import record  # noqa: E402
from harness import parity  # noqa: E402
from seer_scale import distributed  # noqa: E402
from seer_scale.errors import ConfigError  # noqa: E402
from seer_scale.parallel.compatibility import check_sharding  # noqa: E402

COMMAND = "make gpu-check"
SECONDS = 1500  # for one case in all its variants; offload to NVMe takes minutes
# Largest relative difference of a step's loss and, in float32, of parameters and buffers too.
# fp32: sums in another order, as on CPU. Low precision: of CPU runs 0.002 (bf16); a loss scale that
# starts too high skips the first steps.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "amp-o1": 5e-2, "apex-o1": 5e-2}
CASES = parity.CASES | parity.GPU_CASES
MODULES = {"zero": "deepspeed", "fairscale": "fairscale"}


@dataclass(frozen=True)
class Variant:
    """One training of the matrix."""

    case: str
    checkpointing: str = "none"
    precision: str = "fp32"
    syncbn: str = "native"

    def __str__(self) -> str:
        parts = [self.case, f"recompute {self.checkpointing}", self.precision]
        return ", ".join(parts + [f"syncbn {self.syncbn}"] * (self.syncbn != "native"))


@dataclass(frozen=True)
class Row:
    """What became of a variant; differences as in `parity`, None where nothing was trained."""

    variant: Variant
    status: Literal["ok", "failed", "skipped"]
    why: str = ""
    differences: dict[str, float] = field(default_factory=dict)
    skipped_steps: int = 0
    seconds: float = 0.0


def variants(cases: Sequence[str]) -> list[list[Variant]]:
    """What is trained, case by case; NVMe, which is slow, last and in float32 only."""
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


def check(groups: list[list[Variant]], ranks: int, *, device: str, steps: int) -> list[Row]:
    """Trains each group of variants in processes of its own; prints the rows as they come."""
    rows: list[Row] = []
    for kinds in groups:
        waiting = list(kinds)
        while waiting:
            done, trouble = launch(waiting, ranks, device=device, steps=steps)
            del waiting[: len(done)]
            if waiting:  # the ranks are gone: what comes after it is trained by others
                done.append(Row(waiting.pop(0), "failed", trouble or "it ended without a result"))
            elif trouble:
                done[-1] = replace(done[-1], status="failed", why=trouble)
            for row in done:
                print(f"{row.status:8}{row.variant} {figures(row)}", flush=True)
            rows += done
    return rows


def launch(
    waiting: list[Variant], ranks: int, *, device: str, steps: int
) -> tuple[list[Row], str | None]:
    """The rows of the variants that ran to an end, and what stopped the next one, if anything."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        port, path = probe.getsockname()[1], Path(folder) / "rows.jsonl"
        probe.close()
        path.touch()
        trouble = None
        context = start_processes(  # type: ignore[no-untyped-call]
            work, (ranks, port, waiting, device, steps, path), nprocs=ranks, join=False
        )
        deadline = time.monotonic() + SECONDS
        try:
            while not context.join(timeout=max(0.1, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    trouble = f"no end after {SECONDS} s"
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
    rank: int,
    ranks: int,
    port: int,
    waiting: list[Variant],
    device: str,
    steps: int,
    path: Path,
) -> None:
    """One rank: trains the variants one after the other; rank 0 compares and writes rows."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or the group is nccl's
        torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    where = str(distributed.init())
    plain = parity.plain_loop(steps, device=device) if rank == 0 else None
    for variant in waiting:
        began = time.perf_counter()
        if why := reason_to_skip(variant, cuda=device == "cuda"):
            row = Row(variant, "skipped", why)
        else:
            trained = parity.train(
                variant.case, variant.checkpointing, steps, where, **sections(variant)
            )
            row = compared(variant, trained, plain) if plain else Row(variant, "ok")
        if rank == 0:
            row = replace(row, seconds=round(time.perf_counter() - began, 1))
            with path.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
    distributed.shutdown()


def sections(variant: Variant) -> dict[str, dict[str, Any]]:
    """What a variant changes in the configuration of its case."""
    train = {"precision": variant.precision}
    return {"train": train, "sharding": {"syncbn": variant.syncbn}}


def reason_to_skip(variant: Variant, *, cuda: bool) -> str | None:
    """Why a variant cannot be had on this machine; None if it can."""
    case, ranks = CASES[variant.case], distributed.world_size()
    module = MODULES.get(case.strategy)
    if module and importlib.util.find_spec(module) is None:
        return f"{module} is not installed"
    if case.strategy == "hsdp" and ranks < case.world_size:
        return f"needs {case.world_size} ranks and there are {ranks}"
    changes = sections(variant)
    config = parity.configuration(case, variant.checkpointing, **changes)
    with tempfile.TemporaryDirectory() as nvme:
        try:
            check_sharding(
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
    """Holds a training against the plain loop in float32."""
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


def figures(row: Row) -> str:
    """The differences in two digits, or why there are none."""
    shown = [f"{name} {value:.1e}" for name, value in row.differences.items()]
    if row.skipped_steps:
        shown.append(f"{row.skipped_steps} steps skipped by the loss scale")
    return "; ".join(shown) if shown else row.why.splitlines()[-1]


def report(rows: list[Row]) -> int:
    """Prints the table and, last, what failed; the exit status."""
    header = ["case", "recompute", "precision", "syncbn", "result", "differences", "s"]
    cells = [
        [*asdict(row.variant).values(), row.status, figures(row), f"{row.seconds:.0f}"]
        for row in rows
    ]
    print(f"\n{record.markdown(header, cells)}")
    failed = [row for row in rows if row.status == "failed"]
    done = sum(row.status == "ok" for row in rows)
    skipped = len(rows) - done - len(failed)
    print(f"{done} as they should be, {skipped} skipped, {len(failed)} failed")
    for row in failed:
        print(f"FAILED {row.variant}: {row.why}")
    return 1 if failed or not done else 0


def usable_ranks(gpus: int) -> int:
    """The most GPUs that the matrix's batch divides over."""
    return max(n for n in range(1, gpus + 1) if parity.BATCH % n == 0)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--steps", type=int, default=parity.STEPS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("no CUDA GPU here, nothing was checked; on CPU the matrix is `make parity`")
        return 0
    ranks = usable_ranks(torch.cuda.device_count())
    print(f"{record.in_words(record.environment())}\n{ranks} ranks, nccl", flush=True)
    rows = check(variants(options.cases), ranks, device="cuda", steps=options.steps)
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
