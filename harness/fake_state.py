"""What one of many ranks holds: bytes of the tensors of real engines on torch's fake group."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import memory
from benchmarks.rg10b_plan import fake_ranks
from seer_scale.config.ds_config import load_ds_config, resolve_ds_config
from seer_scale.optim.slices import local
from seer_scale.parallel.engine import shard
from seer_scale.parallel.fsdp import build_mesh, shard_units
from seer_scale.train import build

CPU, META = torch.device("cpu"), torch.device("meta")


def configuration(strategy: str, shard_size: int, trunk: str) -> Any:
    """The recipe of `benchmarks/memory.py` with another trunk."""
    arguments = [a for a in memory.STRATEGIES[strategy] if "shard_size" not in a]
    if strategy == "hsdp":
        arguments.append(f"sharding.shard_size={shard_size}")
    return memory.configuration(*arguments, *memory.TINY, f"model.trunk={trunk}")


def engine_state(strategy: str, world: int, shard_size: int, trunk: str) -> list[int]:
    """Bytes of rank 0's parameters, gradients and optimizer state, all gradients complete.

    A process can do this for one `zero` strategy only: DeepSpeed remembers its first group.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    config = configuration(strategy, shard_size, trunk)
    model = build.model_of(config, META)
    ds_config = None
    if path := config.sharding.deepspeed_config:
        raw = load_ds_config(memory.record.ROOT / path)
        ds_config = resolve_ds_config(raw, path=path, config=config, world_size=world)
    with fake_ranks(world, 0):
        engine: Any = shard(lambda _: model, lambda _: _ones, config, ds_config, CPU)
        memory.apply_schedule(engine.param_groups, lr=0.0)
        memory.forward_and_backward(engine, config)
        engine.step()
        memory.forward_and_backward(engine, config)
        return [_bytes(tensors) for tensors in memory.held_by(engine)]


def fake_tensor_state(strategy: str, world: int, shard_size: int, trunk: str) -> list[int]:
    """The same of `fsdp`, `hsdp` or one rank of `ddp` in FakeTensorMode, with torch's own SGD."""
    config = configuration(strategy, shard_size, trunk)
    with fake_ranks(world, 0):
        # A mesh reads numbers off tensors while it is made, which fake ones do not have.
        mesh = build_mesh(CPU, shard_size if strategy == "hsdp" else None)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = build.model_of(config, CPU if strategy == "ddp" else META)
            if strategy != "ddp":
                units = model.units(config.sharding.unit_parameters)
                shard_units(model, units, mesh, reshard_after_forward=True, prefetch=1)
                model.to_empty(device=CPU)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9, foreach=False)
            _, scores = model([torch.empty(4, 3, 32, 32)])
            scores.sum().backward()
            optimizer.step()
            own = list(model.parameters())
            state = [s["momentum_buffer"] for s in optimizer.state.values()]
            return [_bytes(tensors) for tensors in (own, [p.grad for p in own], state)]


def _ones(name: str, start: int, stop: int) -> torch.Tensor:
    return torch.ones(stop - start)


def _bytes(tensors: Any) -> int:
    storages = {}
    for tensor in tensors:
        storage = local(tensor.detach()).untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
