"""What to change where memory ran out: the planner's figures with and without each knob."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from seer_scale.config import RunConfig, schema
from seer_scale.errors import ConfigError
from seer_scale.planner.memory import GIB
from seer_scale.planner.plan import plan
from seer_scale.planner.planned import Plan

ENOUGH = "b200_180gb"  # of the GPUs: how much memory there is does not change what is taken


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of a GPU's memory, or of the host's."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(
    error: BaseException, config: RunConfig, *, nodes: int, gpus_per_node: int, cuda: bool
) -> str:
    """The sentence for a rank without memory: what the planner counts, which knob frees how much.

    Args:
        error: of the allocation.
        config: of the run.
        nodes: machines.
        gpus_per_node: ranks of each.
        cuda: whether it was a GPU's memory.
    """
    first = str(error).split(". ")[0].split("\n")[0].removeprefix("[enforce fail at alloc_cpu.cpp:")
    said = f"a rank ran out of {'GPU' if cuda else 'host'} memory ({first[:200] or 'no memory'})"
    where: dict[str, Any] = {
        "hardware": ENOUGH if cuda else "cpu",
        "nodes": nodes,
        "gpus_per_node": gpus_per_node,
    }
    try:
        own = plan(config, **where)
    except ConfigError as reason:
        return (
            f"{said}, and the planner cannot say more ({reason}): lower train.micro_batch_size, "
            "or set sharding.activation_checkpointing=full"
        )
    freed = sorted(_freed(own, where), key=lambda knob: -knob[1])
    knobs = ", ".join(f"{name} frees {bytes_ / GIB:.3g} GiB" for name, bytes_ in freed)
    return (
        f"{said}: the planner counts {own.memory.total / GIB:.3g} GiB of tensors a rank, "
        f"{own.memory.activations / GIB:.3g} of them activations; "
        f"{knobs or 'no knob frees much: use GPUs with more memory, or more of them'}; "
        "`seer-scale plan --search` says what fits"
    )


def _freed(own: Plan, where: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Settings that take less, and the bytes a rank that they free."""
    for name, changes, strategy in _knobs(own):
        values = own.config.model_dump()
        for section, keys in changes.items():
            values[section] |= keys
        try:
            config = schema.validate(values, sources={}, recipe=own.config.recipe)
            saved = own.memory.total - plan(config, strategy=strategy, **where).memory.total
        except ConfigError:  # it does not go with the rest
            continue
        if saved > 0.01 * own.memory.total:
            yield name, saved


def _knobs(own: Plan) -> Iterator[tuple[str, dict[str, dict[str, Any]], str | None]]:
    """A setting in words, its keys by section, and the strategy if it is another."""
    train, sharding = own.config.train, own.config.sharding
    if train.micro_batch_size > 1:
        half, twice = train.micro_batch_size // 2, 2 * train.gradient_accumulation
        keys: dict[str, Any] = {"micro_batch_size": half, "gradient_accumulation": twice}
        text = f"train.micro_batch_size={half} with train.gradient_accumulation={twice}"
        yield text, {"train": keys}, None
    if sharding.activation_checkpointing != "full":
        keys = {"activation_checkpointing": "full", "checkpoint_groups": None}
        yield "sharding.activation_checkpointing=full", {"sharding": keys}, None
    if own.world > 1 and own.strategy == "ddp":
        yield "sharding.strategy=fsdp", {}, "fsdp"
    if own.world > 1 and own.strategy in ("zero0", "zero1", "zero2"):
        yield "--deepspeed_config ds_configs/zero3.json", {}, "zero3"
