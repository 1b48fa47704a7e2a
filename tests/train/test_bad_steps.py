"""Losses that are not finite and losses that jump, in whole runs: left out, rewound, or the end."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.memory import build_engine, configuration
from harness.jobs import ROOT, arguments, lines, losses, run_job, write_images
from seer_scale.checkpoint import list_checkpoints
from seer_scale.checkpoint.manifest import read_manifest, write_manifest
from seer_scale.errors import UserError
from seer_scale.tracking import NullTracker
from seer_scale.train.saves import Saves, TrainState
from seer_scale.train.spikes import WINDOW, spike_threshold

Distributed = Callable[..., list[Any]]
EVERY = ("checkpoint.every=1", "checkpoint.keep=99", "run.log_samples=true", "optim.base_lr=0.05")
STRATEGIES = {
    "ddp": [],
    "fsdp": ["sharding.strategy=fsdp"],
    "zero2": ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json")],
    "zero3": ["--deepspeed_config", str(ROOT / "ds_configs" / "zero3.json")],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def disturbed(
    argv: list[str], factor: float, calls: tuple[int, ...], ranks: tuple[int, ...], window: int
) -> str:
    """A run whose loss is multiplied in some calls of some ranks; its error, or ""."""
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


def state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """All that training goes on from, but for the random generators."""
    found = {}
    for path in sorted((run_dir / "checkpoints" / f"step_{step:08d}").glob("rank_*.safetensors")):
        found |= {f"{path.name}/{key}": value for key, value in load_file(path).items()}
    assert found
    return {key: value for key, value in found.items() if "local/rng" not in key}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[key]) for key, value in one.items())


# ------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize(
    ("strategy", "more"),
    [
        ("ddp", ["train.gradient_accumulation=2", "objective.queue_length=8"]),
        ("fsdp", ["train.precision=amp-o1"]),
        ("zero2", []),
        pytest.param("ddp", [], marks=pytest.mark.slow),
        pytest.param("fsdp", [], marks=pytest.mark.slow),
        ("zero3", []),
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
        named = f"rank 1 (samples {', '.join(map(str, ids))})"
        assert (named in said[0]) == (rank == 1)


# ----------------------------------------------------------------------------------- spikes


def test_a_spike_is_far_above_the_usual() -> None:
    usual = [5 + 0.1 * math.sin(7 * step) for step in range(WINDOW)]
    middle = median(usual)
    mad = median(abs(loss - middle) for loss in usual)
    assert spike_threshold(usual, 10) == middle + 10 * mad
    assert spike_threshold(usual[1:], 10) == math.inf
    assert spike_threshold([1e9, *usual], 10) == spike_threshold(usual, 10)  # older ones are gone
    outliers = [*usual[:-3], 1e9, 1e9, 1e9]
    assert spike_threshold(outliers, 10) == pytest.approx(spike_threshold(usual, 10), rel=0.02)
    flat = [math.log(3000)] * WINDOW  # a plateau has no spread of its own
    assert spike_threshold(flat, 10) == pytest.approx(1.05 * math.log(3000))


@pytest.mark.parametrize("answer", ["continue", "skip"])
def test_a_spike_is_said_and_left_out_only_if_asked(
    distributed: Distributed, images: Path, tmp_path: Path, answer: str
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, *EVERY, "train.steps=7", f"train.on_spike={answer}")
    assert distributed(disturbed, 2, argv, 30.0, (6,), (0,), 4) == ["", ""]  # 15 times the mean
    assert same(state(run_dir, 5), state(run_dir, 6)) == (answer == "skip")
    skipped = [line.get("update_skipped") for line in lines(run_dir)]
    assert skipped == [None] * 5 + [float(answer == "skip"), None]
    assert not same(state(run_dir, 6), state(run_dir, 7))


def resumed_behind(run_dir: Path, checkpoint: Path, position: int) -> None:
    """A copy of a checkpoint whose position in the stream is another."""
    folder = run_dir / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, folder)
    content = read_manifest(folder)
    files = content.pop("files")
    content["state"]["samples_seen"] = position
    (folder / "manifest.json").unlink()
    write_manifest(folder, {k: v for k, v in content.items() if k != "format"}, files)


@pytest.mark.parametrize(
    "strategy", ["ddp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "zero3"))]
)
def test_a_rewind_is_a_run_resumed_behind_the_spike(
    distributed: Distributed, images: Path, tmp_path: Path, strategy: str
) -> None:
    run_dir, oracle, killed = tmp_path / "run", tmp_path / "oracle", tmp_path / "killed"
    common = ["checkpoint.every=2", "checkpoint.keep=99", *EVERY[2:], "train.steps=9"]
    common += STRATEGIES[strategy]
    argv = arguments(images, run_dir, *common, "train.on_spike=rewind")
    assert distributed(disturbed, 2, argv, 30.0, (6,), (0, 1), 4) == ["", ""]
    (rewind,) = lines(run_dir, "rewinds.jsonl")
    assert (rewind["step"], rewind["to_step"]) == (6, 4)
    assert (rewind["samples_seen"], rewind["goes_on_at"]) == (32, 48)
    assert rewind["loss"] > rewind["threshold"]
    middle = run_dir / "checkpoints" / "step_00000004"
    resumed_behind(oracle, middle, 48)
    argv = arguments(images, oracle, *common, "--resume", "auto")
    distributed(run_job, 2, argv)
    assert losses(run_dir)[4:] == losses(oracle)
    assert lines(run_dir, "samples.jsonl")[4:] == lines(oracle, "samples.jsonl")
    assert [line["samples_seen"] for line in lines(run_dir)][4:] == [56, 64, 72, 80, 88]
    # Killed between the rewind and the next checkpoint, it goes on behind the spike too.
    shutil.copytree(middle, killed / "checkpoints" / middle.name)
    shutil.copy(run_dir / "rewinds.jsonl", killed / "rewinds.jsonl")
    distributed(run_job, 2, arguments(images, killed, *common, "--resume", "auto"))
    assert losses(killed) == losses(oracle)


def test_rewinding_without_end_is_the_end(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    more = ("train.steps=9", "train.on_spike=rewind", "train.max_rewinds=2", "checkpoint.every=4")
    argv = arguments(images, run_dir, *more)
    said = distributed(disturbed, 1, argv, 30.0, tuple(range(6, 99)), (0,), 4)[0]
    assert "a spike above" in said
    assert "gone back to the checkpoint of step 4 2 times (train.max_rewinds=2)" in said
    assert len(lines(run_dir, "rewinds.jsonl")) == 2
    assert [path.name for path in list_checkpoints(run_dir / "checkpoints")] == ["step_00000004"]


def test_a_damaged_record_of_rewinds_is_one_sentence(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rewinds.jsonl").write_text(json.dumps({"step": 3}) + "\n")
    argv = arguments(images, tmp_path / "run")
    (said,) = distributed(disturbed, 1, argv, 1.0, (), (), WINDOW)
    assert "rewinds.jsonl is damaged" in said


def test_a_checkpoint_of_no_finite_loss_is_not_the_best(tmp_path: Path) -> None:
    config = configuration("model.trunk=regnety_debug")
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(tmp_path)})})
    engine, said = build_engine(config)[0], list[str]()
    saves, state = Saves(config, NullTracker(), None, said.append), TrainState()
    best = []
    for step, seen in enumerate([[2.0], [], [3.0], [1.0, 1.5]], start=1):
        for loss in seen:
            saves.observe(loss)
        state.step = step
        saves.start(state, engine, {}, urgent=True)
        assert saves.finish() is None
        best.append(state.best_loss)
    assert best == [2.0, 2.0, 2.0, 1.25]
    assert said == []
