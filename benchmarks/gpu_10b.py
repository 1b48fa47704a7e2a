"""Measures time, memory and loss of SwAV steps of RG-10B on a single GPU.

    make gpu-10b
    python benchmarks/gpu_10b.py [--batch IMAGES] [--estimate]

Uses the project's own `shard()`, engine and objective. Strategy ddp on one rank needs least memory:
the weights exist once, where FSDP would gather a second copy of each unit. Weights and momentum are
float32, the optimizer steps in the backward pass, every block is recomputed in bf16. Crops are
noise: this measures memory and speed, not learning. Results go into benchmarks/results/.
`--estimate` needs no GPU: it computes the peak memory and puts it into docs/sharding.md.
"""

from __future__ import annotations

import argparse
import faulthandler
import math
import sys
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import record
from seer_scale.config import RunConfig
from seer_scale.config.recipe import parse
from seer_scale.distributed.gpus import unused_gpus
from seer_scale.models import seeded_values
from seer_scale.objectives import build_objective
from seer_scale.objectives.build import Objective
from seer_scale.optim.schedules import prototypes_frozen
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.optim.slices import Values
from seer_scale.parallel.build_optimizer import PROTOTYPES
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.live_bytes import LiveBytes
from seer_scale.performance.cuda_allocator import let_segments_grow
from seer_scale.performance.gpu_start import start_gpu
from seer_scale.train import build
from seer_scale.train.build_engine import engine_of

ROOT = record.ROOT
COMMAND = "make gpu-10b"
TRUNK, BATCH, STEPS = "rg_10b", 16, 3  # the recipe's images per GPU
WHOLE_GIB = 130  # a GPU of this size holds the momentum too
HOST_GIB = 75  # a GPU of the 80 GB class does not
HOST_MEMORY_GIB = 64  # for 36 GiB of pinned momentum and the values on their way to the GPU
SECONDS = 470  # the process ends itself after this time
GIB = 2**30
ESTIMATED = (4, 16, 64)  # batches of the table in docs/sharding.md


@dataclass(frozen=True)
class Step:
    """One optimizer step."""

    loss: float
    grad_norm: float
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device at the fullest moment of a step.

    Attributes:
        weights: float32 parameters and buffers.
        momentum: float32 momentum, as large as the parameters.
        on_device: peak with the momentum on the device.
        on_host: peak with the momentum on the host; the device holds one tensor's at a time.
    """

    weights: int
    momentum: int
    on_device: int
    on_host: int


def configuration(trunk: str, batch: int, **more: str) -> RunConfig:
    """Resolves RG-10B's recipe for a single GPU; `more` overrides keys, with __ for the dot."""
    settings = {
        "model__trunk": trunk,
        "train__micro_batch_size": str(batch),
        "train__precision": "bf16",  # float16's loss scale needs all gradients before a step
        "optim__fuse_backward": "true",
        "optim__warmup_steps": "0",  # the first steps of a warm-up would change no float32 weight
        "sharding__activation_checkpointing": "full",  # one block needs less than a group
        "sharding__checkpoint_groups": "null",
        "sharding__sync_bn_group_size": "0",
        **more,
    }
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    recipes = ROOT / "launch" / "recipes"
    return parse(["--recipe", "seer_rg10b", *overrides], recipes=recipes, ranks=1).config


def build_engine(config: RunConfig, device: torch.device) -> Engine:
    """Builds the model with its initial values and its optimizer, on one rank."""
    source = partial(seeded_values, seed=config.run.seed)
    return engine_of(config, source, None, device)


def objective_of(config: RunConfig) -> Objective:
    """Builds the recipe's objective."""
    crops, section = sum(config.data.crop_counts), config.objective
    return build_objective(section.name, crops=crops, options=section.options)


def run(config: RunConfig, device: torch.device, steps: int) -> tuple[list[Step], float]:
    """Builds the model and takes steps; returns the steps and the seconds of building."""
    began = time.perf_counter()
    engine, objective = build_engine(config, device), objective_of(config)
    _wait_for(device)
    built = time.perf_counter() - began
    taken = []
    for step in range(steps):
        crops = noise(config, step, device)
        _wait_for(device)
        began = time.perf_counter()
        loss, grad_norm = take_step(engine, objective, config, step, crops)
        values = loss.item(), grad_norm.item()  # waits for the device
        taken.append(Step(*values, time.perf_counter() - began))
    return taken, built


def take_step(
    engine: Engine, objective: Objective, config: RunConfig, step: int, crops: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Takes one step as the trainer does; returns the loss and the norm of the gradient."""
    still = prototypes_frozen(step, config.optim.freeze_prototypes_steps)
    apply_schedule(
        engine.param_groups,
        lr=build.learning_rate_of(config, step),
        frozen=PROTOTYPES if still else frozenset(),
    )
    loss, _ = objective(*engine(crops, None))
    engine.backward(loss)
    grad_norm = engine.step()
    assert grad_norm is not None
    return loss.detach(), grad_norm


def noise(config: RunConfig, step: int, device: torch.device) -> list[Tensor]:
    """Makes random crops of every resolution, each [count * B, 3, size, size]."""
    generator = torch.Generator(device).manual_seed(step)
    batch, data = config.train.micro_batch_size, config.data
    return [
        torch.randn(count * batch, 3, size, size, generator=generator, device=device)
        for count, size in zip(data.crop_counts, data.crop_sizes, strict=True)
    ]


def estimate(config: RunConfig) -> Estimate:
    """Estimates the memory of two steps by running them on tensors without memory.

    Not counted: workspaces of kernels, the CUDA context, and gaps of the allocator.
    """
    cpu = torch.device("cpu")
    # Built outside: modules cannot replace fake tensors by fake tensors.
    model = build.model_of(config, torch.device("meta"))
    data, batch = config.data, config.train.micro_batch_size

    def empty(_: nn.Module) -> Values:
        return lambda name, start, stop: torch.empty(stop - start)

    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live:
        engine = engine_of(config, empty, None, cpu, model=lambda _: model)
        for step in range(2):  # the momentum exists only after the first step
            crops = [
                torch.empty(count * batch, 3, size, size)
                for count, size in zip(data.crop_counts, data.crop_sizes, strict=True)
            ]
            take_step(engine, objective_of(config), config, step, crops)
        momenta = [part.momentum for part in engine.slices()]
    largest = max(momentum.nbytes for momentum in momenta)
    return Estimate(
        weights=sum(t.nbytes for t in [*engine.model.parameters(), *engine.model.buffers()]),
        momentum=sum(momentum.nbytes for momentum in momenta),
        on_device=live.peak(),
        on_host=live.peak(without=momenta) + largest,
    )


def momentum_on_host(gpu_gib: float, host_gib: float) -> bool | None:
    """Whether the momentum must be on the host; None if RG-10B does not fit even then."""
    if gpu_gib >= WHOLE_GIB:
        return False
    return True if gpu_gib >= HOST_GIB and host_gib >= HOST_MEMORY_GIB else None


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ------------------------------------------------------------------------------- the command


def on_gpu(batch: int, steps: int) -> int:
    """Takes the steps on this machine's first GPU; returns 0, also if no GPU is large enough."""
    need = (
        f"RG-10B needs a CUDA GPU of {WHOLE_GIB} GiB, or of {HOST_GIB} GiB with {HOST_MEMORY_GIB} "
        "GiB of host memory"
    )
    reason = unused_gpus()
    if not torch.cuda.is_available():
        print(f"{reason or 'no CUDA GPU here'}, nothing was run: {need}")
        return 1 if reason else 0
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    let_segments_grow()  # as a training does: no gaps between tensors of 3 GiB
    if warning := start_gpu():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    device, env = torch.device("cuda", 0), record.environment()
    total = torch.cuda.get_device_properties(device).total_memory / GIB
    on_host = momentum_on_host(total, env["memory_gib"])
    if on_host is None:
        print(
            f"{env['gpus'][0]} has {total:.0f} GiB and this machine {env['memory_gib']:.0f}, "
            f"nothing was run: {need}"
        )
        return 0
    config = configuration(TRUNK, batch, optim__momentum_on_host=str(on_host).lower())
    expected = estimate(config)
    guess = (expected.on_host if on_host else expected.on_device) / GIB
    where = "host" if on_host else "GPU"
    print(f"{record.in_words(env)}\nmomentum on the {where}, {batch} images a step", flush=True)
    print(f"estimated peak {guess:.1f} of {total:.1f} GiB", flush=True)
    try:
        taken, built = run(config, device, steps)
    except torch.OutOfMemoryError as error:
        print(f"out of memory with a batch of {batch}, try BATCH={batch // 2}: {error}")
        return 1
    peak = torch.cuda.max_memory_allocated(device) / GIB
    reserved = torch.cuda.max_memory_reserved(device) / GIB
    show(taken, batch, built)
    print(f"peak memory {peak:.1f} GiB (reserved {reserved:.1f}), estimated {guess:.1f}")
    path = record.save(
        "gpu_10b",
        f"{COMMAND} BATCH={batch}",
        {
            "batch": batch,
            "momentum_on_host": on_host,
            "build_seconds": built,
            "steps": [asdict(step) for step in taken],
            "peak_gib": peak,
            "reserved_gib": reserved,
            "estimated_gib": guess,
        },
    )
    print(f"kept in {path.relative_to(ROOT)}")
    return 0 if all(math.isfinite(step.loss + step.grad_norm) for step in taken) else 1


def show(taken: list[Step], batch: int, built: float) -> None:
    """Prints time, memory and loss of the steps."""
    print(f"built with its initial values in {built:.0f} s")
    for number, step in enumerate(taken, start=1):
        print(
            f"step {number}: loss {step.loss:.5f}, grad_norm {step.grad_norm:.4g}, "
            f"{step.seconds:.2f} s, {step.seconds / batch:.3f} s per image"
        )


def estimate_table(trunk: str, batches: tuple[int, ...]) -> str:
    """Writes the estimated peak by batch in GiB as a Markdown table."""
    rows: list[list[Any]] = []
    for batch in batches:
        found = estimate(configuration(trunk, batch))
        parts = (found.weights, found.momentum, found.on_device, found.on_host)
        rows.append([batch, *(f"{part / GIB:.1f}" for part in parts)])
    head = ["images", "weights", "momentum", "peak: momentum on the GPU", "peak: on the host"]
    return record.markdown(head, rows)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=BATCH, help="images per step")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--estimate", action="store_true", help="estimate memory; needs no GPU")
    options = parser.parse_args()
    if not options.estimate:
        return on_gpu(options.batch, options.steps)
    text = estimate_table(TRUNK, ESTIMATED)
    print(text)
    record.put_into(ROOT / "docs" / "sharding.md", "gpu-10b-estimate", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
