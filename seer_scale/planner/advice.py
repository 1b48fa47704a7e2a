"""Advice after an out-of-memory error: the memory that each setting would free, as planned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from seer_scale.errors import ConfigError
from seer_scale.planner.memory import GIB
from seer_scale.planner.planned import Plan

GPU = "b200_180gb"  # any GPU would do: its memory does not change what a rank needs
Planner = Callable[..., Plan]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation of GPU memory or host memory failed."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def out_of_memory(error: BaseException, planner: Planner, *, cuda: bool) -> str:
    """Writes the sentence for a rank that ran out of memory.

    The sentence says how much memory the planner counts, and how much each setting would free.

    Args:
        error: the error of the allocation.
        planner: `planner.plan.plan` of the run's own configuration and ranks. Called with the name
            of a hardware profile, and with `changes` or `strategy` for a changed run.
        cuda: True if GPU memory ran out, False if host memory did.
    """
    first = str(error).split(". ")[0].split("\n")[0].removeprefix("[enforce fail at alloc_cpu.cpp:")
    said = f"a rank ran out of {'GPU' if cuda else 'host'} memory ({first[:200] or 'no memory'})"
    hardware = GPU if cuda else "cpu"
    try:
        own = planner(hardware)
    except ConfigError as reason:
        return (
            f"{said}, and the planner cannot say more ({reason}): lower train.micro_batch_size, "
            "or set sharding.activation_checkpointing=full"
        )
    freed = sorted(_freed(own, planner, hardware), key=lambda knob: -knob[1])
    knobs = ", ".join(f"{name} frees {bytes_ / GIB:.3g} GiB" for name, bytes_ in freed)
    return (
        f"{said}: the planner counts {own.memory.total / GIB:.3g} GiB of tensors a rank, "
        f"{own.memory.activations / GIB:.3g} of them activations; "
        f"{knobs or 'no setting frees much: use GPUs with more memory, or more GPUs'}; "
        "`seer-scale plan --search` says what fits"
    )


def _freed(own: Plan, planner: Planner, hardware: str) -> Iterator[tuple[str, float]]:
    """Settings that need less memory, and the bytes per rank that each of them frees."""
    for name, changes, strategy in _knobs(own):
        try:
            changed = planner(hardware, strategy=strategy, changes=changes)
        except ConfigError:  # the setting contradicts another one
            continue
        saved = own.memory.total - changed.memory.total
        if saved > 0.01 * own.memory.total:
            yield name, saved


def _knobs(own: Plan) -> Iterator[tuple[str, dict[str, dict[str, Any]], str | None]]:
    """Settings to try: in words, as keys by section, and the strategy where another is meant."""
    batch = own.batch
    if batch.micro_batch_size > 1:
        half, twice = batch.micro_batch_size // 2, 2 * batch.gradient_accumulation
        keys: dict[str, Any] = {"micro_batch_size": half, "gradient_accumulation": twice}
        text = f"train.micro_batch_size={half} with train.gradient_accumulation={twice}"
        yield text, {"train": keys}, None
    if own.activation_checkpointing != "full":
        keys = {"activation_checkpointing": "full", "checkpoint_groups": None}
        yield "sharding.activation_checkpointing=full", {"sharding": keys}, None
    if own.world > 1 and own.strategy == "ddp":
        yield "sharding.strategy=fsdp", {}, "fsdp"
    if own.world > 1 and own.strategy in ("zero0", "zero1", "zero2"):
        yield "--deepspeed_config ds_configs/zero3.json", {}, "zero3"
