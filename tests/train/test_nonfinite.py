"""Steps with a loss that is not finite, in whole runs: skipped, dumped, or the end of the run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.jobs import ROOT, arguments, lines
from harness.nvme import COMPILING_SECONDS, prepare_nvme
from harness.pool import Distributed
from seer_scale.checkpoint import list_checkpoints
from seer_scale.errors import UserError
from seer_scale.train.spikes import WINDOW
from tests.train.runs import (
    EVERY,
    FACTORS,
    STRATEGIES,
    ZERO,
    disturbed,
    disturbed_gradients,
    refused,
    same,
    state,
)


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("ddp", ["train.gradient_accumulation=2", "objective.queue_length=8"]),
        ("fsdp", ["train.precision=amp-o1"]),
        pytest.param("zero2", [], marks=pytest.mark.long),
        pytest.param("ddp", [], marks=pytest.mark.slow),
        pytest.param("fsdp", [], marks=pytest.mark.slow),
        pytest.param("zero3", [], marks=pytest.mark.long),
    ],
)
@pytest.mark.parametrize("factor", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_on_one_rank_moves_nothing_on_any(
    distributed: Distributed,
    images: Path,
    tmp_path: Path,
    strategy: str,
    more: list[str],
    factor: float,
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, *EVERY, "train.steps=5", *STRATEGIES[strategy], *more)
    per_step = 2 if "train.gradient_accumulation=2" in more else 1
    assert distributed(disturbed, 2, argv, factor, (2 * per_step + 1,), (1,), WINDOW) == ["", ""]
    assert same(state(run_dir, 2), state(run_dir, 3))
    assert not same(state(run_dir, 1), state(run_dir, 2))
    assert not same(state(run_dir, 3), state(run_dir, 4))
    metrics = lines(run_dir)
    assert [line.get("update_skipped") for line in metrics] == [None, None, 1.0, None, None]
    assert ["loss" in line for line in metrics] == [True, True, False, True, True]
    assert all(math.isfinite(line["loss"]) for line in metrics if "loss" in line)


MATRIX = {
    "ddp": [],
    "fsdp": ["sharding.strategy=fsdp"],
    "hsdp": ["sharding.strategy=hsdp", "sharding.shard_size=1"],
    **ZERO,
}


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy",
    [
        "zero3",
        *[pytest.param(name, marks=pytest.mark.long) for name in MATRIX if name != "zero3"],
    ],
)
def test_nan_losses_and_nan_or_infinite_gradients_move_nothing(
    distributed: Distributed, images: Path, tmp_path: Path, strategy: str
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, *EVERY, "train.steps=7", *MATRIX[strategy])
    assert distributed(disturbed_gradients, 2, argv, FACTORS) == ["", ""]
    skipped = [line.get("update_skipped", 0.0) for line in lines(run_dir)]
    assert skipped == [1.0 if step in FACTORS else 0.0 for step in range(1, 8)]
    for step in range(2, 8):
        assert same(state(run_dir, step - 1), state(run_dir, step)) == (step in FACTORS), step


def one_by_one(name: str, folder: Path) -> list[str]:
    """Arguments of a run whose tensors step one by one."""
    if name == "fsdp with fuse_backward":
        return ["sharding.strategy=fsdp", "optim.fuse_backward=true"]
    prepare_nvme()
    made = json.loads((ROOT / "ds_configs" / "zero3_nvme.json").read_text())
    for section in ("offload_optimizer", "offload_param"):
        made["zero_optimization"][section]["nvme_path"] = str(folder / "nvme")
    made["zero_optimization"]["offload_param"]["buffer_size"] = 1_000_000
    path = folder / "zero3_nvme.json"
    path.write_text(json.dumps(made))
    return ["--deepspeed_config", str(path)]


@pytest.mark.long
@pytest.mark.timeout(COMPILING_SECONDS + 300)
@pytest.mark.parametrize("factors", FACTORS.values())
@pytest.mark.parametrize("name", ["fsdp with fuse_backward", "nvme"])
def test_where_tensors_step_one_by_one_the_first_ends_the_run(
    distributed: Distributed,
    images: Path,
    tmp_path: Path,
    name: str,
    factors: tuple[float, float],
) -> None:
    """Some tensors have moved before anybody can know, so that no step can be taken back."""
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, *EVERY, "train.steps=5", *one_by_one(name, tmp_path))
    said = distributed(disturbed_gradients, 2, argv, {3: factors})
    assert said[0] == said[1]
    assert "of step 3 is" in said[0]
    assert "1 in a row (train.max_nonfinite)" in said[0]
    assert str(run_dir / "checkpoints" / "step_00000002") in said[0]
    assert [line["step"] for line in lines(run_dir)][-1] == 2
    assert list_checkpoints(run_dir / "checkpoints")[-1].name == "step_00000002"
    assert all(bool(value.isfinite().all()) for value in state(run_dir, 2).values())


def test_too_many_in_a_row_end_the_run_with_a_dump(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, *EVERY, "train.steps=9", "train.max_nonfinite=2")
    said = distributed(disturbed, 2, argv, math.nan, (3, 5, 6, 7), (1,), WINDOW)
    assert said[0] == said[1]
    assert [line["step"] for line in lines(run_dir)][-1] == 5
    assert "the loss of step 6 is nan" in said[0]
    assert "2 in a row (train.max_nonfinite)" in said[0]
    assert str(run_dir / "checkpoints" / "step_00000005") in said[0]  # as it was after step 4
    assert same(state(run_dir, 4), state(run_dir, 5))
    for rank in (0, 1):
        found = load_file(run_dir / "nonfinite_step_6" / f"rank_{rank}.safetensors")
        ids = found["sample_ids.0"].tolist()
        assert len(ids) == 4
        assert found["crops.0.0"].shape == (2 * 4, 3, 32, 32)
        assert found["scores.0"].shape == (2 * 4, 16)
        assert bool(torch.isfinite(found["loss.0"])) == (rank == 0)
        named = f"rank {rank} (samples {', '.join(map(str, ids))})"
        assert (named in said[0]) == (rank == 1)


def test_a_loss_that_is_not_finite_stops_the_run(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    argv = arguments(images, tmp_path / "run", "optim.larc=false", "optim.lr=1e30")
    (sentence,) = distributed(refused, 1, argv, UserError)
    assert "the loss of step" in sentence
    assert "nan" in sentence
