"""Whole runs in a pool of processes: records, world sizes, resuming, plug-ins, bad images."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from harness.jobs import ROOT, arguments, lines, losses, run_job, write_images
from seer_scale.checkpoint import CheckpointReader, list_checkpoints, rank_files
from seer_scale.convert.loading import load
from seer_scale.errors import CheckpointError, UserError

Distributed = Callable[..., list[Any]]
ZERO = {
    name: ["--deepspeed_config", str(ROOT / "ds_configs" / f"{name}.json")]
    for name in ("zero0", "zero1", "zero2", "zero3")
}
FIELDS = {
    *("step", "loss", "lr", "grad_norm", "images_per_second", "step_time"),
    *("peak_memory_gib", "samples_seen", "loss_over_ln_k", "prototype_usage_entropy"),
    "embedding_std",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


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


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, ["objective.queue_length=8", "data.workers=1"]),
        pytest.param(2, ["train.gradient_accumulation=2"], marks=pytest.mark.slow),
        pytest.param(2, ZERO["zero2"], marks=pytest.mark.slow),
        (2, [*ZERO["zero3"], "sharding.activation_checkpointing=full"]),
        (2, ["sharding.strategy=fsdp", "train.precision=amp-o1"]),
    ],
    ids=["alone, queue", "ddp, accumulation", "zero2", "zero3, recompute", "fsdp, float16"],
)
def test_resuming_equals_not_having_stopped_bit_for_bit(
    distributed: Distributed, images: Path, tmp_path: Path, world_size: int, more: list[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = ["run.log_samples=true", "checkpoint.every=3", "checkpoint.keep=9", *more]
    distributed(run_job, world_size, arguments(images, whole, *common))
    middle = whole / "checkpoints" / "step_00000003"
    shutil.copytree(middle, resumed / "checkpoints" / middle.name)
    for name in ("metrics.jsonl", "samples.jsonl"):  # as a run killed after step 8 leaves them
        shutil.copy(whole / name, resumed / name)
    argv = arguments(images, resumed, *common, "--resume", "auto")
    assert distributed(run_job, world_size, argv) == [8] * world_size
    assert losses(resumed) == losses(whole)
    assert [line.get("loss_scale") for line in lines(resumed)] == [
        line.get("loss_scale") for line in lines(whole)
    ]
    assert lines(resumed, "samples.jsonl") == lines(whole, "samples.jsonl")
    for name in ("step_00000006", "step_00000008"):
        assert_same_tensors(whole / "checkpoints" / name, resumed / "checkpoints" / name)


def run_with_late_writes(argv: list[str]) -> int:
    """The threads of saves sleep until the training has gone on by a step or more."""
    write = rank_files.stream_tensors

    def late(*args: Any) -> Any:
        time.sleep(3)
        return write(*args)

    rank_files.stream_tensors = late
    try:
        return run_job(argv)
    finally:
        rank_files.stream_tensors = write


@pytest.mark.parametrize(
    ("world_size", "more"),
    [
        (1, []),
        (1, ["optim.fuse_backward=true"]),
        (2, ZERO["zero2"]),
        pytest.param(2, [*ZERO["zero3"], "train.gradient_accumulation=2"], marks=pytest.mark.slow),
        pytest.param(2, ["sharding.strategy=fsdp"], marks=pytest.mark.slow),
    ],
    ids=["ddp", "fused", "zero2", "zero3, accumulation", "fsdp"],
)
def test_what_is_saved_is_the_step_s_however_late_it_is_written(
    distributed: Distributed, images: Path, tmp_path: Path, world_size: int, more: list[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = ["checkpoint.every=3", "checkpoint.keep=9", "train.steps=6", *more]
    distributed(run_with_late_writes, world_size, arguments(images, whole, *common))
    middle = str(whole / "checkpoints" / "step_00000003")
    argv = arguments(images, resumed, *common, "--resume", middle)
    distributed(run_job, world_size, argv)
    assert losses(resumed) == losses(whole)[3:]
    last = Path("checkpoints") / "step_00000006"
    assert_same_tensors(whole / last, resumed / last)


def test_a_checkpoint_of_one_strategy_is_read_by_another(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    common = ["checkpoint.every=4", "optim.base_lr=0.05", "checkpoint.keep=9"]
    sharded = [*common, *ZERO["zero3"]]
    distributed(run_job, 2, arguments(images, whole, "train.micro_batch_size=4", *sharded))
    source = str(whole / "checkpoints" / "step_00000004")
    alone = [*common, "train.micro_batch_size=8", "--resume", source]
    distributed(run_job, 1, arguments(images, moved, *alone))
    assert losses(moved) == pytest.approx(losses(whole)[4:], rel=1e-4)


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


def test_the_exported_trunk_is_the_checkpoint_s(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    distributed(run_job, 2, arguments(images, tmp_path / "run", *ZERO["zero3"]))
    folder = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    reader = CheckpointReader(folder)
    exported = load(folder).state_dict()
    assert len(exported) > 50
    for name, value in exported.items():
        assert torch.equal(value, reader.whole(f"trunk.{name}")), name


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


def test_simclr_learns_something(distributed: Distributed, images: Path, tmp_path: Path) -> None:
    argv = arguments(
        images,
        tmp_path / "run",
        *("objective.name=simclr", "train.steps=30", "optim.larc=false", "optim.lr=0.05"),
    )
    distributed(run_job, 2, argv)
    first, last = losses(tmp_path / "run")[:5], losses(tmp_path / "run")[-5:]
    assert sum(last) < sum(first)


def refused(argv: list[str], kind: type[UserError]) -> str:
    try:
        run_job(argv)
    except kind as error:
        return str(error)
    return "not refused"


def test_another_model_s_checkpoint_is_refused(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    distributed(run_job, 1, arguments(images, tmp_path / "run"))
    argv = arguments(images, tmp_path / "run", "model.head_dims=[24, 16]", "--resume", "auto")
    (sentence,) = distributed(refused, 1, argv, CheckpointError)
    assert "another model" in sentence
    assert "head.layers.0.weight is [32" in sentence or "instead of [24" in sentence
    (sentence,) = distributed(refused, 1, arguments(images, tmp_path / "run"), UserError)
    assert "already holds a run" in sentence
    assert len(lines(tmp_path / "run")) == 8  # nothing was lost


def test_a_run_is_not_overwritten(distributed: Distributed, images: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    distributed(run_job, 1, arguments(images, first))
    distributed(run_job, 1, arguments(images, second))
    elsewhere = str(first / "checkpoints" / "step_00000004")
    shutil.rmtree(second / "checkpoints" / "step_00000008")
    for more in (["--resume", elsewhere], []):
        (sentence,) = distributed(refused, 1, arguments(images, second, *more), UserError)
        assert f"run.dir={second} already holds a run (step_00000004)" in sentence
    shutil.rmtree(second / "checkpoints")  # killed before its first checkpoint
    (sentence,) = distributed(refused, 1, arguments(images, second), UserError)
    assert "no checkpoint yet" in sentence
    assert len(lines(second)) == 8


def test_a_loss_that_is_not_finite_stops_the_run(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    argv = arguments(images, tmp_path / "run", "optim.larc=false", "optim.lr=1e30")
    (sentence,) = distributed(refused, 1, argv, UserError)
    assert "the loss of step" in sentence
    assert "nan" in sentence
