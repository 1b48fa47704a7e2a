"""Measures a training step of this project beside the contenders of `benchmarks/peers.py`.

Weights, crops, batch and precision are the same. Every contender is a process of its own, since
process settings of this project (how the C library keeps memory) would otherwise apply to all.
Steps take turns, so that a machine that slows down does so for all. `benchmarks/bench.py` runs this
and keeps the results.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks import peers
from harness.engines import build_engine, configuration
from seer_scale.config import RunConfig
from seer_scale.distributed.ports import free_port
from seer_scale.models import build_model, initialise
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.parallel.live_bytes import LiveBytes
from seer_scale.performance.host_memory import keep_freed_memory
from seer_scale.performance.processor import multiplies_bfloat16
from seer_scale.train import build

OURS, CHECKPOINTED, PLAIN, LIGHTLY = "seer-scale", "seer-scale, recomputing", "plain", "lightly"
OURS_BF16, PLAIN_BF16 = f"{OURS}, bf16", f"{PLAIN}, bf16"


@dataclass(frozen=True)
class Contender:
    """The result of one way to train.

    Attributes:
        name: name in the table.
        seconds: seconds per image, median over the steps; one step has `batch` images.
        memory: peak bytes that a step allocates: activations, gradients and DDP's buckets.
        loss: loss of the first step.
    """

    name: str
    seconds: float
    memory: int
    loss: float


def our_step(config: RunConfig, device: torch.device | None = None) -> peers.Step:
    """Builds the trainer's step, from float crops in torch's usual memory format."""
    engine, _ = build_engine(config, device=device)
    apply_schedule(engine.param_groups, lr=peers.LR)
    objective = build.objective_of(config)
    where = next(engine.model.parameters()).device
    memory_format = build.memory_format_of(config.train.memory_format, where)

    def step(images: Sequence[Tensor]) -> Tensor:
        crops = [crop.contiguous(memory_format=memory_format) for crop in images]
        embeddings, scores = engine(crops, None)
        loss, _ = objective(embeddings, scores)
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def in_turns(
    functions: Sequence[Callable[[], object]], repeats: int, warm_up: int = 1
) -> list[float]:
    """Measures the median seconds of functions that take turns, after some calls of each."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(warm_up):
        for function in functions:
            function()
    for _ in range(repeats):
        for index, function in enumerate(functions):
            began = time.perf_counter()
            function()
            seconds[index].append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


def arguments(trunk: str, batch: int) -> tuple[str, ...]:
    """Arguments of the timed recipe: SwAV with LARC, 2x160+4x96 pixels."""
    return (
        *(f"model.trunk={trunk}", f"train.micro_batch_size={batch}", "sharding.strategy=ddp"),
        *("data.crop_sizes=[160,96]", "data.crop_counts=[2,4]", "model.head_dims=[512,128]"),
        *("model.head_batch_norm=false", "model.prototypes=3000", "optim.larc=true"),
        *(f"objective.temperature={peers.TEMPERATURE}", f"objective.epsilon={peers.EPSILON}"),
        f"objective.sinkhorn_iterations={peers.ITERATIONS}",
    )


def contenders() -> tuple[str, ...]:
    """Names all contenders; those in bfloat16 where the processor multiplies it."""
    low = (OURS_BF16, PLAIN_BF16) if multiplies_bfloat16() else ()
    return (OURS, CHECKPOINTED, PLAIN, LIGHTLY, *low)


def compare(trunk: str, batch: int, repeats: int) -> list[Contender]:
    """Times all contenders, each on one rank with its own copy of the same weights."""
    workers: dict[str, Worker] = {}
    for name in contenders():
        worker = Worker(name, trunk, batch)
        if isinstance(loss := worker.ask(), str):
            print(f"no row for {name}, which is not installed ({loss})")
        else:
            workers[name], worker.loss = worker, loss
    memory = {name: int(worker.ask("memory")) for name, worker in workers.items()}
    # The first steps of a process allocate its memory: they are not measured.
    seconds = in_turns([worker.step for worker in workers.values()], repeats, warm_up=6)
    for worker in workers.values():
        worker.end()
    return [
        Contender(name, found / batch, memory[name], worker.loss)
        for (name, worker), found in zip(workers.items(), seconds, strict=True)
    ]


class Worker:
    """A process that takes one contender's steps on request."""

    def __init__(self, name: str, trunk: str, batch: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        threads = torch.get_num_threads()
        self._process = context.Process(
            target=_serve, args=(there, name, trunk, batch, threads), daemon=True
        )
        self._process.start()
        there.close()
        self.loss = float("nan")

    def ask(self, order: str | None = None) -> float | str:
        """Sends an order and returns the answer; without an order, the process's first message."""
        if order:
            self._here.send(order)
        answer: float | str = self._here.recv()  # EOFError if the process has died
        return answer

    def step(self) -> None:
        """Takes one step."""
        self.ask("step")

    def end(self) -> None:
        """Ends the process."""
        self._here.send("end")
        self._process.join()


def _serve(there: Connection, name: str, trunk: str, batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    dist.init_process_group("gloo", rank=0, world_size=1)
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.randn(count * batch, 3, size, size, generator=generator)
        for count, size in ((2, 160), (4, 96))
    ]
    try:
        step, buckets = _step_of(name, trunk, batch)
    except ImportError as error:
        there.send(str(error))
        return
    there.send(float(step(images)))
    while (order := there.recv()) != "end":
        if order == "memory":
            # In the memory format of each contender; in a run the data loader makes it.
            last = torch.channels_last if name.startswith(OURS) else torch.contiguous_format
            formatted = [crop.contiguous(memory_format=last) for crop in images]
            there.send(step_bytes(step, formatted) + buckets)
        else:
            there.send(float(step(images)))
    dist.destroy_process_group()


def _step_of(name: str, trunk: str, batch: int) -> tuple[peers.Step, int]:
    """Builds a contender's step; also returns the bytes of DDP's buckets."""
    low = name in (OURS_BF16, PLAIN_BF16)
    if name.startswith(OURS):
        keep_freed_memory()  # as launch/pretrain.py does
        mode = "full" if name == CHECKPOINTED else "none"
        options = [*arguments(trunk, batch), f"sharding.activation_checkpointing={mode}"]
        config = configuration(*options, precision="bf16" if low else "fp32")
        return our_step(config), 0  # a single rank needs no DDP
    model = build_model(trunk, head_dims=[512, 128], head_batch_norm=False, prototypes=3000)
    initialise(model, 0)  # seed 0, as in the recipe
    make = peers.lightly_step if name == LIGHTLY else peers.plain_step
    step, wrapped = make(model, trunk, crops=6, autocast=low)
    return step, bucket_bytes(wrapped)


def bucket_bytes(wrapped: DistributedDataParallel) -> int:
    """Bytes of DDP's buckets, which `LiveBytes` does not see."""
    logged = wrapped._get_ddp_logging_data()  # type: ignore[no-untyped-call]
    sizes: str = logged["bucket_sizes"]
    return sum(map(int, sizes.split(", ")))


def step_bytes(step: peers.Step, images: Sequence[Tensor]) -> int:
    """Peak bytes that a step allocates, beside weights and momentum."""
    with LiveBytes() as live:
        step(images)
    peak: int = live.peak()
    return peak
