"""Bytes that one of many ranks holds: tensors of real engines on torch's fake process group."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness import engines
from harness.fake_ranks import fake_ranks
from seer_scale.config.ds_config import ds_config_of
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.optim.slices import local
from seer_scale.parallel.fsdp import build_mesh, shard_units
from seer_scale.train import build
from seer_scale.train.build_engine import engine_of

CPU, META = torch.device("cpu"), torch.device("meta")


def configuration(strategy: str, shard_size: int, trunk: str) -> Any:
    """The recipe of `harness/engines.py` with another trunk."""
    arguments = engines.arguments_of(strategy, shard_size)
    return engines.configuration(*arguments, *engines.TINY, f"model.trunk={trunk}")


def engine_state(strategy: str, world: int, shard_size: int, trunk: str) -> list[int]:
    """Bytes of rank 0's parameters, gradients and optimizer state, all gradients complete.

    A process can do this for one `zero` strategy only: DeepSpeed remembers its first group.
    """
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    config = configuration(strategy, shard_size, trunk)
    model = build.model_of(config, META)
    ds_config = ds_config_of(config, world)
    with fake_ranks(world, 0):
        engine: Any = engine_of(config, engines.ones, ds_config, CPU, model=lambda _: model)
        apply_schedule(engine.param_groups, lr=0.0)
        engines.forward_and_backward(engine, config)
        engine.step()
        engines.forward_and_backward(engine, config)
        return [_bytes(tensors) for tensors in engines.held_by(engine)]


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


def _bytes(tensors: Any) -> int:
    storages = {}
    for tensor in tensors:
        storage = local(tensor.detach()).untyped_storage()
        storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())
