"""One rank's engine as a training builds it, its step on noise, and the tensors that it holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from harness.jobs import ROOT
from seer_scale import distributed
from seer_scale.config import RunConfig
from seer_scale.config.ds_config import ds_config_of
from seer_scale.config.recipe import parse
from seer_scale.models import seeded_values
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.optim.slices import local
from seer_scale.parallel.activation_budget import RecomputePlan
from seer_scale.parallel.engine import Engine
from seer_scale.parallel.torch_engine import TorchEngine
from seer_scale.train import build
from seer_scale.train.build_engine import engine_of

RECIPE = "swav_in1k_regnety_16gf"
# Name -> arguments of launch/pretrain.py; hsdp shares a copy between two ranks.
STRATEGIES: dict[str, tuple[str, ...]] = {
    "ddp": ("sharding.strategy=ddp",),
    "fsdp": ("sharding.strategy=fsdp",),
    "hsdp": ("sharding.strategy=hsdp", "sharding.shard_size=2"),
    **{f"zero{n}": ("--deepspeed_config", f"ds_configs/zero{n}.json") for n in range(4)},
}
# State does not depend on them; of activations there are as many as take seconds on a CPU.
TINY = ("train.micro_batch_size=2", "data.crop_sizes=[32]", "data.crop_counts=[2]")
CPU = torch.device("cpu")
WARM = 3  # steps before the first that counts: ZeRO's stage 3 records its order in two of them


def arguments_of(strategy: str, shard_size: int) -> list[str]:
    """Arguments of a strategy; under hsdp so many ranks share a copy."""
    kept = [a for a in STRATEGIES[strategy] if "shard_size" not in a]
    return [*kept, f"sharding.shard_size={shard_size}"] if strategy == "hsdp" else kept


def configuration(*more: str, precision: str = "fp32") -> RunConfig:
    """The recipe's model, in float32 unless told otherwise."""
    argv = [
        *("--recipe", RECIPE, "run.dir=unused", "data.path=unused", "tracking.enabled=false"),
        *("sharding.sync_bn_group_size=0", "train.gradient_accumulation=1"),
        *(f"train.precision={precision}", *more),
    ]
    return parse(argv, recipes=ROOT / "launch" / "recipes", ranks=distributed.world_size()).config


def ones(_: object) -> Callable[[str, int, int], Tensor]:
    """Returns a source of values, for a model whose values do not matter."""
    return lambda name, start, stop: torch.ones(stop - start)


def build_engine(
    config: RunConfig, plan: RecomputePlan | None = None, device: torch.device | None = None
) -> tuple[Engine, dict[str, Any]]:
    """What a training builds on this rank, on the CPU unless told otherwise; and
    zero_optimization, if there is one.
    """
    ds_config = ds_config_of(config, distributed.world_size())
    source = partial(seeded_values, seed=config.run.seed)
    engine = engine_of(config, source, ds_config, device or CPU, plan)
    apply_schedule(engine.param_groups, lr=0.01)
    return engine, (ds_config or {}).get("zero_optimization", {})


def images_of(config: RunConfig) -> list[tuple[int, int]]:
    """Per resolution the images of a micro-batch and their size."""
    images = [count * config.train.micro_batch_size for count in config.data.crop_counts]
    return list(zip(images, config.data.crop_sizes, strict=True))


def forward_and_backward(
    engine: Engine,
    config: RunConfig,
    memory_format: torch.memory_format = torch.contiguous_format,
    device: torch.device = CPU,
    before_backward: Callable[[], object] = lambda: None,
) -> None:
    """With the run's objective, on noise; only the engine's own tensors outlive it."""
    objective = build.objective_of(config)
    crops = [
        torch.randn(count, 3, size, size, device=device).contiguous(memory_format=memory_format)
        for count, size in images_of(config)
    ]
    embeddings, scores = engine(crops, None)
    loss, _ = objective(embeddings, scores)
    before_backward()
    engine.backward(loss)


def held_by(engine: Any) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Parameters, gradients, optimizer state: the tensors that an engine keeps them in."""
    own = list(engine.model.parameters())
    state = [tensor for held in engine._optimizer.state.values() for tensor in held.values()]
    gradients = [parameter.grad for parameter in own if parameter.grad is not None]
    if isinstance(engine, TorchEngine) or engine._stage == 0:
        return own, gradients, state
    zero = engine._engine.optimizer
    gradients += [part for parts in zero.averaged_gradients.values() for part in parts or []]
    if engine._stage < 3:
        return own, gradients, [*state, *zero.single_partition_of_fp32_groups]
    slices = [parameter.ds_tensor for parameter in own]
    return [*own, *slices], gradients, [*state, *zero.fp32_partitioned_groups_flat]


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Bytes by address of what lies behind tensors, each once."""
    found = [local(tensor.detach()).untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in found if storage.nbytes()}
