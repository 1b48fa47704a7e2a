"""The parity matrix: every strategy against a plain loop, SwAV with LARC, freezing and unit rows.

The oracle is one process and plain torch: torch's BatchNorm on the whole batch, Sinkhorn as SwAV's
authors describe it, LARC and momentum written out. Of the package it uses the bare model alone.
`benchmarks/parity.py` prints the whole table, the tests hold parts of it.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seer_scale import distributed as dist
from seer_scale.config import RunConfig
from seer_scale.models import MultiCropModel, build_model, initialise, seeded_values
from seer_scale.objectives.swav import SwAV
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.optim.slices import buffers_without_padding
from seer_scale.parallel.build_optimizer import PROTOTYPES
from seer_scale.parallel.engine import Engine
from seer_scale.train.build_engine import engine_of

STEPS, BATCH, FROZEN = 20, 8, 5
# Calm: at a high rate, or with BatchNorm in the head too, the rounding of another order of sums
# doubles with every step.
LR, MOMENTUM, DECAY, TRUST = 0.003, 0.9, 1e-3, 1e-2
CROPS, SIZES = (2, 2), (64, 32)
K, D = 12, 16
TEMPERATURE, EPSILON, ITERATIONS = 0.1, 0.05, 3
SOURCE = partial(seeded_values, seed=0)


@dataclass(frozen=True)
class Case:
    """One strategy, as the configuration names it."""

    strategy: str
    world_size: int = 2
    sharding: dict[str, Any] = field(default_factory=dict)
    zero: dict[str, Any] | None = None


CPU = {"device": "cpu"}
NVME = {"device": "nvme", "nvme_path": "", "buffer_count": 5}  # the path: of this run
CASES = {
    "ddp": Case("ddp"),
    "fsdp": Case("fsdp"),
    "hsdp(2x2)": Case("hsdp", 4, {"shard_size": 2}),
    "zero1": Case("zero", zero={"stage": 1}),
    "zero2": Case("zero", zero={"stage": 2}),
    "zero3": Case("zero", zero={"stage": 3}),
    "zero1+cpu-offload": Case("zero", zero={"stage": 1, "offload_optimizer": CPU}),
    "zero2+cpu-offload": Case("zero", zero={"stage": 2, "offload_optimizer": CPU}),
    "zero3+cpu-offload": Case(
        "zero", zero={"stage": 3, "offload_optimizer": CPU, "offload_param": CPU}
    ),
    "zero3+nvme": Case(
        "zero",
        zero={
            "stage": 3,
            "offload_optimizer": NVME,
            "offload_param": {**NVME, "buffer_size": 1_000_000},
        },
    ),
}

# Of `make gpu-check` too: one needs CUDA, the other is where Apex works under DeepSpeed.
GPU_CASES = {"fairscale": Case("fairscale"), "zero0": Case("zero", zero={"stage": 0})}


@dataclass
class Result:
    """What a training leaves: per-step losses and gradient norms, whole tensors by name."""

    losses: list[float]
    norms: list[float]
    tensors: dict[str, Tensor]


def build(device: torch.device | str) -> MultiCropModel:
    """Builds the model of every case, without values."""
    return build_model(
        "regnety_debug", head_dims=[32, D], head_batch_norm=False, prototypes=K, device=device
    )


@cache
def images(step: int) -> list[Tensor]:
    """Crops of every resolution, [count, BATCH, 3, size, size]: views of the same pictures."""
    generator = torch.Generator().manual_seed(step)
    pictures = torch.randn(1, BATCH, 3, 8, 8, generator=generator)
    crops = []
    for count, size in zip(CROPS, SIZES, strict=True):
        large = F.interpolate(pictures[0], size=size, mode="bilinear")
        noise = torch.randn(count, BATCH, 3, size, size, generator=generator)
        crops.append(large[None] + 0.5 * noise)
    return crops


# ------------------------------------------------------------------------------- the plain loop


def plain_swav(scores: Tensor) -> Tensor:
    """SwAV's loss (arXiv 2006.09882, section 3) of scores [crops * B, K] of the whole batch."""
    crops = scores.view(sum(CROPS), BATCH, K)
    total = scores.new_zeros(())
    for assign in (0, 1):
        with torch.no_grad():
            q = torch.exp(crops[assign].detach().double() / EPSILON).T  # [K, B]
            q /= q.sum()
            for _ in range(ITERATIONS):
                q = q / q.sum(dim=1, keepdim=True) / K
                q = q / q.sum(dim=0, keepdim=True) / BATCH
            codes = (q * BATCH).T.to(scores.dtype)
        for other in range(sum(CROPS)):
            if other != assign:
                predicted = F.log_softmax(crops[other] / TEMPERATURE, dim=1)
                total = total - (codes * predicted).sum(1).mean() / (sum(CROPS) - 1) / 2
    return total


def plain_loop(
    steps: int = STEPS,
    precision: torch.dtype | None = None,
    device: str = "cpu",
    mistake: str | None = None,
) -> Result:
    """One process, torch's BatchNorm, whole tensors; `precision` of an autocast, if any.

    A `mistake` that sharding invites shows what the comparison can tell: `larc` (ratios of half a
    tensor), `rows` (prototypes renormalised on a copy), `frozen` (not frozen), `momentum` (lost
    once).
    """
    model = build("cpu")
    initialise(model, 0)
    model.to(device)
    momenta: dict[str, Tensor] = {}
    losses, norms = [], []
    for step in range(steps):
        crops = [crop.flatten(0, 1).to(device) for crop in images(step)]
        with torch.autocast(device, precision or torch.bfloat16, enabled=precision is not None):
            _, scores = model(crops)
        loss = plain_swav(scores)
        model.zero_grad()
        loss.backward()
        squares = 0.0
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name == "prototypes.weight" and step < FROZEN and mistake != "frozen":
                    continue
                half = len(p) // 2 if mistake == "larc" else 0
                assert p.grad is not None
                g, p_norm, g_norm = p.grad, p[half:].norm(), p.grad[half:].norm()
                squares += float(g_norm) ** 2
                if p_norm > 0 and g_norm > 0:
                    ratio = TRUST * p_norm / (g_norm + DECAY * p_norm + 1e-8)
                    g = ratio * (g + DECAY * p)
                if mistake == "momentum" and step == FROZEN:
                    momenta.pop(name, None)
                m = momenta[name] = MOMENTUM * momenta.get(name, torch.zeros_like(p)) + g
                p.sub_(LR * m)
                if name == "prototypes.weight" and mistake != "rows":
                    p.div_(p.norm(dim=1, keepdim=True))
        losses.append(loss.item())
        norms.append(squares**0.5)
    return Result(losses, norms, {k: v.detach().cpu() for k, v in model.state_dict().items()})


# ------------------------------------------------------------------------------- the project


def configuration(case: Case, checkpointing: str = "none", **more: dict[str, Any]) -> RunConfig:
    """The configuration of a case at the world size there is; `more` by section."""
    accumulation = more.get("train", {}).get("gradient_accumulation", 1)
    sections: dict[str, dict[str, Any]] = {
        "run": {"dir": "unused"},
        "train": {
            "steps": STEPS,
            "micro_batch_size": BATCH // dist.world_size() // accumulation,
        },
        "model": {"trunk": "regnety_debug", "head_dims": [32, D], "prototypes": K},
        "objective": {},
        "optim": {
            "momentum": MOMENTUM,
            "weight_decay": DECAY,
            "trust_coefficient": TRUST,
            "freeze_prototypes_steps": FROZEN,
        },
        "sharding": {
            "strategy": case.strategy,
            "deepspeed_config": "unused.json" if case.zero else None,
            "activation_checkpointing": checkpointing,
            **case.sharding,
        },
        "data": {"path": "unused", "crop_sizes": SIZES, "crop_counts": CROPS},
        "checkpoint": {},
        "tracking": {},
    }
    for section, values in more.items():
        sections[section] = {**sections[section], **values}
    return RunConfig.model_validate({"recipe": "parity", **sections})


def ds_config(case: Case, config: RunConfig, nvme: str) -> dict[str, Any] | None:
    """What `resolve_ds_config` would make of the case's zero_optimization."""
    from seer_scale.config.ds_config import resolve_ds_config

    if case.zero is None:
        return None
    zero: dict[str, Any] = {"reduce_bucket_size": 1_000_000, **case.zero}
    for section in ("offload_optimizer", "offload_param"):
        if zero.get(section, {}).get("device") == "nvme":
            zero[section] = {**zero[section], "nvme_path": nvme}
    raw = {"zero_optimization": zero, "steps_per_print": 10**9}
    return resolve_ds_config(
        raw,
        path="case",
        micro_batch_size=config.train.micro_batch_size,
        gradient_accumulation=config.train.gradient_accumulation,
        world_size=dist.world_size(),
    )


def build_engine(
    case: Case, config: RunConfig, device: torch.device, dtype: torch.dtype = torch.float32
) -> Engine:
    """Builds the engine of a case on this rank; every rank calls it."""
    makes = dist.is_main() and "nvme" in str(case.zero)
    nvme = dist.broadcast_object(tempfile.mkdtemp(prefix="nvme") if makes else "")
    zero = ds_config(case, config, nvme)

    def of_type(where: torch.device) -> MultiCropModel:
        model = build(where)  # whose fake twin, of a budget, cannot be cast
        return model if dtype == torch.float32 else model.to(dtype)

    return engine_of(config, SOURCE, zero, device, model=of_type)


def my_crops(step: int, device: torch.device, part: int = 0, parts: int = 1) -> list[Tensor]:
    """This rank's rows of micro-batch `part` of `parts`, [count * rows, 3, size, size] each."""
    rows = BATCH // parts // dist.world_size()
    first = part * BATCH // parts + dist.rank() * rows
    return [crop[:, first : first + rows].flatten(0, 1).to(device) for crop in images(step)]


def train(
    name: str,
    checkpointing: str = "none",
    steps: int = STEPS,
    device: str = "cpu",
    **more: dict[str, Any],
) -> Result:
    """Trains a case on every rank of the group; whole tensors on every rank."""
    case, where = (CASES | GPU_CASES)[name], torch.device(device)
    config = configuration(case, checkpointing, **more)
    engine = build_engine(case, config, where)
    losses, norms = run(engine, config, steps, where)
    return Result(losses, norms, whole_tensors(engine))


def run(
    engine: Engine,
    config: RunConfig,
    steps: int,
    where: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[list[float], list[float]]:
    """Trains an engine on the parity's pictures; losses and gradient norms of every step."""
    objective = SwAV(
        crops=sum(CROPS),
        temperature=TEMPERATURE,
        epsilon=EPSILON,
        sinkhorn_iterations=ITERATIONS,
    )
    losses, norms = [], []
    for step in range(steps):
        frozen = PROTOTYPES if step < FROZEN else frozenset()
        apply_schedule(engine.param_groups, lr=LR, frozen=frozen)
        total, norm = torch.zeros((), device=where, dtype=dtype), None
        parts = config.train.gradient_accumulation
        for part in range(parts):
            crops = [crop.to(dtype) for crop in my_crops(step, where, part, parts)]
            loss, _ = objective(*engine(crops, None))
            engine.backward(loss)
            norm = engine.step()
            total += loss.detach() / parts
        assert norm is not None
        losses.append(float(dist.all_reduce(total)) / dist.world_size())
        norms.append(float(norm))
    return losses, norms


def whole_tensors(
    engine: Engine, kind: Literal["values", "momentum"] = "values"
) -> dict[str, Tensor]:
    """Parameters (or momenta) put together from every rank's slices, and buffers, on the host.

    Without padding, as a checkpoint would hold them.
    """
    mine = [
        (part.name, part.shape, part.offset, getattr(part, kind).detach().cpu().clone())
        for part in (held.without_padding() for held in engine.written_slices())
    ]
    tensors: dict[str, Tensor] = {}
    for name, shape, offset, values in dist.gather_lists(mine):
        if name not in tensors:
            tensors[name] = values.new_full(shape, float("nan"))
        tensors[name].view(-1)[offset : offset + len(values)] = values
    buffers = buffers_without_padding(engine.model)
    return tensors | {name: buffer.detach().cpu().clone() for name, buffer in buffers}


# ------------------------------------------------------------------------------- the comparison


def worst_loss(actual: list[float], expected: list[float]) -> float:
    """Largest relative difference of a step's loss; infinite where one is not finite."""
    pairs = zip(actual, expected, strict=True)
    return max(abs(a - b) / abs(b) if a - b == a - b else float("inf") for a, b in pairs)


def worst_tensor(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, float]:
    """Largest difference of parameters and of buffers, |a - b| / max(1, |b|) element by element."""
    assert actual.keys() == expected.keys()
    worst = {"parameters": 0.0, "buffers": 0.0}
    for name, value in expected.items():
        kind = "buffers" if "running_" in name or "num_batches" in name else "parameters"
        difference = (actual[name].double() - value.double()).abs() / value.double().abs().clamp(1)
        worst[kind] = max(worst[kind], float(difference.nan_to_num(float("inf")).max()))
    return worst["parameters"], worst["buffers"]
