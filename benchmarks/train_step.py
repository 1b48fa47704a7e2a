"""A training step of this project beside what people would otherwise write.

Same weights, crops, batch and precision; steps of all contenders take turns, so that a machine that
gets slower does so for all. The activation memory is counted by `LiveBytes` on a CPU and by CUDA's
allocator on a GPU.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.memory import build_engine, configuration
from seer_scale import build
from seer_scale.config import RunConfig
from seer_scale.models import build_model, initialise
from seer_scale.objectives import build_objective
from seer_scale.optim import apply_schedule
from seer_scale.parallel.live_bytes import LiveBytes

OURS, CHECKPOINTED, PLAIN, LIGHTLY = "seer-scale", "seer-scale, recomputing", "plain", "lightly"


@dataclass(frozen=True)
class Contender:
    """One way to train.

    Attributes:
        name: of the table.
        seconds: of an image, median over the steps; one step is `batch` images.
        memory: most bytes that a step makes and frees again, gradients among them.
        loss: of the first step.
    """

    name: str
    seconds: float
    memory: int
    loss: float


def our_step(config: RunConfig, device: torch.device | None = None) -> peers.Step:
    """What the trainer does between two batches, from float crops in torch's usual format."""
    engine, _ = build_engine(config, device=device)
    apply_schedule(engine.param_groups, lr=peers.LR)
    objective = build_objective(
        config.objective.name, crops=sum(config.data.crop_counts), options=config.objective.options
    )
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


def in_turns(functions: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Median seconds of each of several functions that take turns, after one call of each."""
    seconds: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for index, function in enumerate(functions):
            began = time.perf_counter()
            function()
            seconds[index].append(time.perf_counter() - began)
    return [statistics.median(found) for found in seconds]


def arguments(trunk: str, batch: int) -> tuple[str, ...]:
    """The recipe that is timed: SwAV with LARC, 2x160+4x96."""
    return (
        *(f"model.trunk={trunk}", f"train.micro_batch_size={batch}", "sharding.strategy=ddp"),
        *("data.crop_sizes=[160,96]", "data.crop_counts=[2,4]", "model.head_dims=[512,128]"),
        *("model.head_batch_norm=false", "model.prototypes=3000", "optim.larc=true"),
        *(f"objective.temperature={peers.TEMPERATURE}", f"objective.epsilon={peers.EPSILON}"),
        f"objective.sinkhorn_iterations={peers.ITERATIONS}",
    )


def compare(trunk: str, batch: int, repeats: int) -> list[Contender]:
    """Times all contenders on one rank; each makes its own copy of the same weights."""
    images = [torch.randn(2 * batch, 3, 160, 160), torch.randn(4 * batch, 3, 96, 96)]
    model = build_model(trunk, head_dims=[512, 128], head_batch_norm=False, prototypes=3000)
    initialise(model, 0)  # of seed 0, which is the recipe's
    options = arguments(trunk, batch)
    makers: dict[str, Callable[[], peers.Step]] = {
        OURS: lambda: our_step(configuration(*options)),
        CHECKPOINTED: lambda: our_step(
            configuration(*options, "sharding.activation_checkpointing=full")
        ),
        PLAIN: lambda: peers.plain_step(model, trunk, crops=6),
        LIGHTLY: lambda: peers.lightly_step(model, trunk, crops=6),
    }
    steps: dict[str, peers.Step] = {}
    for name, make in makers.items():
        try:
            steps[name] = make()
        except ImportError as error:
            print(f"no row for {name}, which is not installed ({error})")
    losses = {name: float(step(images)) for name, step in steps.items()}
    # In the format that each asks for, which the data loader makes of them in a run.
    formatted = [crop.contiguous(memory_format=torch.channels_last) for crop in images]
    memory = {
        name: activation_bytes(step, formatted if name in (OURS, CHECKPOINTED) else images)
        for name, step in steps.items()
    }
    seconds = in_turns([partial(step, images) for step in steps.values()], repeats)
    return [
        Contender(name, found / batch, memory[name], losses[name])
        for name, found in zip(steps, seconds, strict=True)
    ]


def activation_bytes(step: peers.Step, images: Sequence[Tensor]) -> int:
    """Most bytes that a step makes at once and that are gone after it."""
    with LiveBytes() as live:
        step(images)
        left: int = live.now
    peak: int = live.peak()
    return peak - left
