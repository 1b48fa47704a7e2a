"""What one of many ranks holds, on torch's fake process group: bytes of a real engine's tensors."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory
from benchmarks.rg10b_plan import fake_ranks
from seer_scale import build
from seer_scale.ds_config import load_ds_config, resolve_ds_config
from seer_scale.parallel import engine as engine_module
from seer_scale.parallel.fsdp import build_mesh
from seer_scale.slices import local

TRUNK = "regnety_200mf"


def configuration(strategy: str, shard_size: int, trunk: str = TRUNK) -> Any:
    """The recipe of `benchmarks/memory.py` with a small trunk."""
    arguments = [a for a in memory.STRATEGIES[strategy] if "shard_size" not in a]
    if strategy == "hsdp":
        arguments.append(f"sharding.shard_size={shard_size}")
    return memory.configuration(*arguments, *memory.TINY, f"model.trunk={trunk}")


def held(
    strategy: str, world: int, shard_size: int, *, fake: bool, trunk: str = TRUNK
) -> list[int]:
    """Bytes of rank 0's parameters, gradients and optimizer state once all gradients exist.

    Args:
        strategy: of `benchmarks.memory.STRATEGIES`.
        world: ranks of the fake process group.
        shard_size: of hsdp.
        fake: whether tensors have no memory.
        trunk: key of `TRUNKS`.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    config = configuration(strategy, shard_size, trunk)
    model = build.model_of(config, torch.device("meta"))
    ds_config = None
    if path := config.sharding.deepspeed_config:
        raw = load_ds_config(memory.record.ROOT / path)
        ds_config = resolve_ds_config(raw, path=path, config=config, world_size=world)
    with fake_ranks(world, 0):
        if fake:
            # A mesh reads numbers off tensors while it is made, which fake ones do not have.
            mesh = build_mesh(torch.device("cpu"), shard_size if strategy == "hsdp" else None)
            engine_module.build_mesh = lambda *_: mesh
        with FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext():
            engine: Any = engine_module.shard(
                lambda _: model, lambda _: _ones, config, ds_config, torch.device("cpu")
            )
            memory.apply_schedule(engine.param_groups, lr=0.0)
            memory.forward_and_backward(engine, config)
            engine.step()
            memory.forward_and_backward(engine, config)
            return [_bytes(tensors) for tensors in memory.held_by(engine)]


def _ones(name: str, start: int, stop: int) -> torch.Tensor:
    return torch.ones(stop - start)


def _bytes(tensors: Any) -> int:
    storages = {}
    for tensor in tensors:
        storage = local(tensor.detach()).untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
