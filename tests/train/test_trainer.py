"""Whole runs in a pool of processes: records, world sizes, precision, plug-ins, bad images."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.jobs import arguments, lines, losses, open_trainer, run_job
from harness.pool import Distributed
from seer_scale.checkpoint import list_checkpoints
from seer_scale.convert.loading import load
from seer_scale.data import open_source
from seer_scale.data.order import Order
from tests.train.runs import ZERO, tensors

FIELDS = {
    *("step", "loss", "lr", "grad_norm", "images_per_second", "step_time"),
    *("peak_memory_gib", "samples_seen", "loss_over_ln_k", "prototype_usage_entropy"),
    "embedding_std",
}


def test_a_run_leaves_its_records(distributed: Distributed, images: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, "run.log_samples=true", "checkpoint.every=3")
    assert distributed(run_job, 1, argv) == [8]
    metrics = lines(run_dir)
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert all(line.keys() >= FIELDS for line in metrics)
    assert metrics[-1]["samples_seen"] == 32
    assert yaml.safe_load((run_dir / "config.yaml").read_text())["train"]["steps"] == 8
    assert (run_dir / "curve.png").read_bytes().startswith(b"\x89PNG")
    names = [path.name for path in list_checkpoints(run_dir / "checkpoints")]
    assert names == ["step_00000006", "step_00000008"]  # keep: 2, the last step always
    samples = [ids for line in lines(run_dir, "samples.jsonl") for ids in line["samples"]]
    assert sorted(samples[:24]) == list(range(24))  # an epoch shows every image once
    trunk = load(run_dir)
    assert trunk(torch.zeros(1, 3, 32, 32)).shape == (1, trunk.width)


def watched(argv: list[str]) -> dict[str, set[bool]]:
    """Whether the watchdog may learn a limit, at each of these calls of a run."""
    trainer = open_trainer(argv)
    found: dict[str, set[bool]] = defaultdict(set)

    def watch(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def watching(*given: Any, **more: Any) -> Any:
            place = trainer.watchdog._at[2]
            found[name].add(place in trainer.watchdog._ranks_only)
            return call(*given, **more)

        setattr(owner, name, watching)

    watch(trainer.engine, "backward")
    watch(trainer.engine, "step")
    watch(trainer.guard, "judge")
    watch(trainer.telemetry, "log")
    watch(trainer.saves, "settle")
    watch(trainer.saves, "start")
    try:
        trainer.train()
    finally:
        trainer.close("FINISHED")
    return found


def test_the_watchdog_learns_no_limit_for_what_reads_or_writes_files(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    argv = arguments(images, tmp_path / "run", "train.steps=3", "checkpoint.every=2")
    (found,) = distributed(watched, 1, argv)
    learns = {name for name, values in found.items() if values == {True}}
    assert learns == {"backward", "step"}
    assert all(found[name] == {False} for name in ("judge", "log", "settle", "start"))


def steps_of(argv: list[str]) -> list[dict[str, float]]:
    """What each step reports, its rate as the weights show it, and how far the prototypes moved.

    Without LARC, momentum and decay a step moves every weight by rate * gradient.
    """
    trainer = open_trainer(argv)
    found = []
    try:
        while trainer.state.step < trainer.settings.steps:
            before = {part.name: part.values.clone() for part in trainer.engine.slices()}
            metrics = trainer.train_step().metrics
            moved = {
                part.name: float((part.values.double() - before[part.name]).square().sum())
                for part in trainer.engine.slices()
            }
            prototypes = moved.pop("prototypes.weight")
            shown = math.sqrt(math.fsum(moved.values())) / metrics["grad_norm"]
            found.append({**metrics, "shown_lr": shown, "prototypes_moved": prototypes})
    finally:
        trainer.close("FINISHED")
    return found


def test_a_step_has_its_own_rate_and_freezes_the_prototypes_as_long_as_asked(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    argv = arguments(
        images,
        tmp_path / "run",
        *("train.steps=6", "train.micro_batch_size=4", "train.gradient_accumulation=2"),
        *("optim.base_lr=0.4", "optim.end_lr_ratio=0.1", "optim.warmup_steps=3"),
        *("optim.larc=false", "optim.momentum=0", "optim.weight_decay=0"),
        "optim.freeze_prototypes_steps=5",
    )
    peak = 0.4 * (4 * 2 * 2) / 256  # micro-batch, accumulation and ranks, on one node
    low = 0.1 * peak
    warm = [low + (peak - low) * step / 3 for step in range(3)]
    cosine = [low + (peak - low) * (1 + math.cos(math.pi * step / 6)) / 2 for step in range(3, 6)]
    for steps in distributed(steps_of, 2, argv):
        assert [step["lr"] for step in steps] == pytest.approx([*warm, *cosine], rel=1e-12)
        # In the last step the gradient's norm covers the prototypes, whose rows are scaled.
        shown = [step["shown_lr"] for step in steps[:5]]
        assert shown == pytest.approx([*warm, *cosine][:5], rel=1e-5)  # weights are float32
        assert [step["prototypes_moved"] > 0 for step in steps] == [False] * 5 + [True]


def test_samples_are_recorded_in_the_order_of_the_stream(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    argv = arguments(
        images,
        tmp_path / "run",
        *("train.steps=2", "train.micro_batch_size=2", "train.gradient_accumulation=3"),
        "run.log_samples=true",
    )
    distributed(run_job, 2, argv)
    source = open_source(str(images))
    order = Order(source.shard_sizes, seed=0, version=source.version)
    stream = [order.index(order.place(position)) for position in range(24)]
    recorded = [line["samples"] for line in lines(tmp_path / "run", "samples.jsonl")]
    assert recorded == [stream[:12], stream[12:]]


@pytest.mark.long
@pytest.mark.parametrize(
    "strategy", ["fsdp", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ddp", "zero2"))]
)
def test_two_processes_equal_one(
    distributed: Distributed, images: Path, tmp_path: Path, strategy: str
) -> None:
    calm = ["run.log_samples=true", "optim.base_lr=0.05", "model.head_batch_norm=true"]
    one, two = tmp_path / "one", tmp_path / "two"
    distributed(run_job, 1, arguments(images, one, "train.micro_batch_size=8", *calm))
    more = ZERO.get(strategy, [f"sharding.strategy={strategy}"])
    distributed(run_job, 2, arguments(images, two, "train.micro_batch_size=4", *calm, *more))
    # float32 sums in another order, through eight steps of a BatchNorm network
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert lines(two, "samples.jsonl") == lines(one, "samples.jsonl")


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(n, marks=pytest.mark.slow) for n in ("ddp", "zero0", "zero2", "zero3")],
)
def test_bf16_follows_fp32_and_keeps_its_state_in_float32(
    distributed: Distributed, images: Path, tmp_path: Path, strategy: str
) -> None:
    more = [*ZERO.get(strategy, []), "optim.base_lr=0.05", "train.steps=4"]
    full, half = tmp_path / "fp32", tmp_path / "bf16"
    distributed(run_job, 2, arguments(images, full, *more))
    distributed(run_job, 2, arguments(images, half, "train.precision=bf16", *more))
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), rel=0.05)  # 8 bits of mantissa
    saved = tensors(list_checkpoints(half / "checkpoints")[-1])
    floating = {key: v.dtype for key, v in saved.items() if v.is_floating_point()}
    assert set(floating.values()) == {torch.float32}


def test_broken_images_are_named_and_batches_stay_full(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(images, data)
    (data / "class0" / "000.jpg").write_bytes(b"<html>not found</html>")
    (data / "class1" / "001.jpg").write_bytes(b"")
    run_dir = tmp_path / "run"
    distributed(run_job, 2, arguments(data, run_dir, "run.log_samples=true", "train.steps=6"))
    assert all(len(line["samples"]) == 8 for line in lines(run_dir, "samples.jsonl"))
    bad = {(Path(line["name"]).name, line["cause"]) for line in lines(run_dir, "bad_samples.jsonl")}
    assert bad == {("000.jpg", "not an image"), ("001.jpg", "zero bytes")}
    assert sum(line["bad_samples"] for line in lines(run_dir)) == len(
        lines(run_dir, "bad_samples.jsonl")
    )


PLUGIN = """
from seer_scale.objectives import SimCLR

class Calm(SimCLR):
    def __init__(self, *, crops: int = 6, warmth: float = 0.5) -> None:
        super().__init__(crops=crops, temperature=warmth)

    def __call__(self, embeddings, scores):
        loss, metrics = super().__call__(embeddings, scores)
        return loss, {**metrics, "warmth": 7.0}
"""


def run_with_path(folder: str, argv: list[str]) -> int:
    sys.path.insert(0, folder)
    try:
        return run_job(argv)
    finally:
        sys.path.remove(folder)


def test_an_installed_objective_trains(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    site, project = tmp_path / "site", tmp_path / "project"
    project.mkdir()
    (project / "calm.py").write_text(PLUGIN)
    (project / "setup.py").write_text(
        "from setuptools import setup\n"
        "setup(name='calm', version='1.0', py_modules=['calm'],\n"
        "      entry_points={'seer_scale.objectives': ['calm = calm:Calm']})\n"
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--no-index", "--target", str(site), str(project)], check=True)
    argv = arguments(images, tmp_path / "run", "objective.name=calm", "objective.warmth=0.3")
    distributed(run_with_path, 2, str(site), argv)
    assert all(line["warmth"] == 7.0 for line in lines(tmp_path / "run"))


@pytest.mark.long
def test_simclr_learns_something(distributed: Distributed, images: Path, tmp_path: Path) -> None:
    argv = arguments(
        images,
        tmp_path / "run",
        *("objective.name=simclr", "train.steps=30", "optim.larc=false", "optim.lr=0.05"),
    )
    distributed(run_job, 2, argv)
    first, last = losses(tmp_path / "run")[:5], losses(tmp_path / "run")[-5:]
    assert sum(last) < sum(first)
