"""Jobs whose loss is disturbed, jobs that are refused, and the tensors of their checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from harness.jobs import ROOT, run_job
from seer_scale.errors import UserError

EVERY = ("checkpoint.every=1", "checkpoint.keep=99", "run.log_samples=true", "optim.base_lr=0.05")
ZERO = {
    name: ["--deepspeed_config", str(ROOT / "ds_configs" / f"{name}.json")]
    for name in ("zero0", "zero1", "zero2", "zero3", *(f"zero{n}_offload" for n in (1, 2, 3)))
}
STRATEGIES = {
    "ddp": [],
    "fsdp": ["sharding.strategy=fsdp"],
    "zero2": ZERO["zero2"],
    "zero3": ZERO["zero3"],
}

# Step -> factor of rank 1's loss, and of the gradient that its loss passes on.
FACTORS = {2: (math.nan, 1.0), 4: (1.0, math.nan), 6: (1.0, math.inf)}


class Factor(torch.autograd.Function):
    """Leaves a value as it is, and multiplies its gradient."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0] * ctx.factor, None


def disturbed_gradients(argv: list[str], factors: dict[int, tuple[float, float]]) -> str:
    """Runs a job that is disturbed on rank 1; returns its error, or "".

    Args:
        argv: arguments of the job.
        factors: number of a call of the objective -> factors of its loss and of the gradient that
            the loss passes on.
    """
    from seer_scale import distributed
    from seer_scale.objectives import SwAV

    honest, count = SwAV.__call__, 0

    def call(self: SwAV, embeddings: Any, scores: Any) -> Any:
        nonlocal count
        count += 1
        on_loss, on_gradient = factors.get(count, (1.0, 1.0))
        if distributed.rank() != 1:
            on_loss, on_gradient = 1.0, 1.0
        loss, metrics = honest(self, embeddings, Factor.apply(scores, on_gradient))
        return loss * on_loss, metrics

    SwAV.__call__ = call  # type: ignore[method-assign]
    try:
        run_job(argv)
    except UserError as error:
        return str(error)
    finally:
        SwAV.__call__ = honest  # type: ignore[method-assign]
    return ""


def disturbed(
    argv: list[str], factor: float, calls: tuple[int, ...], ranks: tuple[int, ...], window: int
) -> str:
    """Runs a job whose loss is multiplied in some calls on some ranks; returns its error, or ""."""
    from seer_scale import distributed
    from seer_scale.objectives import SwAV
    from seer_scale.train import spikes

    honest, known, count = SwAV.__call__, spikes.WINDOW, 0

    def call(self: SwAV, embeddings: Any, scores: Any) -> Any:
        nonlocal count
        count += 1
        loss, metrics = honest(self, embeddings, scores)
        hit = count in calls and distributed.rank() in ranks
        return loss * (factor if hit else 1.0), metrics

    SwAV.__call__, spikes.WINDOW = call, window  # type: ignore[method-assign]
    try:
        run_job(argv)
    except UserError as error:
        return str(error)
    finally:
        SwAV.__call__, spikes.WINDOW = honest, known  # type: ignore[method-assign]
    return ""


def refused(argv: list[str], kind: type[UserError]) -> str:
    try:
        run_job(argv)
    except kind as error:
        return str(error)
    return "not refused"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("rank_*.safetensors")):
        found |= {f"{path.name}/{key}": value for key, value in load_file(path).items()}
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    expected, actual = tensors(one), tensors(other)
    assert expected.keys() == actual.keys()
    for key, value in expected.items():
        assert torch.equal(actual[key], value), key


def state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Reads all tensors of a checkpoint except the states of the random generators."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted((run_dir / "checkpoints" / f"step_{step:08d}").glob("rank_*.safetensors")):
        found |= {f"{path.name}/{key}": value for key, value in load_file(path).items()}
    assert found
    return {key: value for key, value in found.items() if "local/rng" not in key}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())
