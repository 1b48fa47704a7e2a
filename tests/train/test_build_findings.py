"""What `seer-scale doctor --run` says, against what a real run then writes and needs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from harness.jobs import RECIPES, ROOT, arguments, write_images
from harness.pool import Distributed
from seer_scale.commands.doctor import main
from seer_scale.config.recipe import parse
from seer_scale.distributed.ports import free_port
from seer_scale.errors import ConfigError
from seer_scale.storage.ownership import owned
from seer_scale.train.build_findings import checkpoint_bytes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def own_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run on this machine may have the usual port."""
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


def doctor(
    images: Path, run_dir: Path, *more: str, capsys: pytest.CaptureFixture[str], ranks: int = 2
) -> tuple[int, dict[str, str]]:
    """The exit status, and the line of each finding by its name."""
    recipe, *keys = arguments(images, run_dir, *more)[1:]
    status = main(["--run", recipe, "--ranks", str(ranks), *keys])
    out = capsys.readouterr().out.splitlines()
    lines = [line for line in out if line and not line.startswith(" ")][:-1]
    assert out[-1].endswith("can start" if status == 0 else "will fail here")
    return status, {line[14:31].strip(): line[:14].strip() + "|" + line[31:] for line in lines}


def _train(argv: list[str]) -> None:
    from harness.jobs import run_job

    run_job(argv)


def test_a_checkpoint_has_the_size_that_was_said(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    argv = arguments(images, tmp_path / "run", "train.steps=2", "optim.warmup_steps=1")
    argv.append("train.micro_batch_size=2")
    distributed(_train, 2, argv)
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    trunk = (folder / "trunk" / "trunk.safetensors").stat().st_size
    said, said_trunk = checkpoint_bytes(parse(argv, recipes=RECIPES, ranks=1).config)
    # What is not counted: names and places of about 200 tensors in every file, and the manifest.
    assert said <= written <= said + 200_000
    assert said_trunk <= trunk <= said_trunk + 50_000
    assert said > 2e6


def test_a_folder_that_holds_a_run_is_free_to_go_on_only(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    status, found = doctor(images, tmp_path / "run", capsys=capsys)
    assert status == 1
    assert "already holds a run" in found["run.dir"]
    status, found = doctor(images, tmp_path / "run", "--resume", "auto", capsys=capsys)
    assert status == 0, found
    with owned(tmp_path / "run", "run.dir", lost=print):
        status, found = doctor(images, tmp_path / "run", "--resume", "auto", capsys=capsys)
    assert status == 1
    assert f"process {os.getpid()}" in found["run.dir"]


@pytest.mark.launch
def test_a_run_that_can_start_is_told_what_it_needs(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, uri = tmp_path / "run", f"sqlite:///{tmp_path}/mlflow.db"
    status, found = doctor(
        images, run_dir, f"tracking.uri={uri}", "eval.every=5", f"eval.data={images},{images}",
        capsys=capsys,
    )  # fmt: skip
    assert status == 0, found
    names = ["memory", "shared memory", "data.path", "eval.data", "open files", "run.dir"]
    names += ["checkpoints", "disk", "models in MLflow", "locks", "port", "mlflow server", "clock"]
    assert list(found) == names
    assert found["data.path"].startswith("ok|24 images")
    assert sorted(tmp_path.iterdir()) == []  # nothing is left behind, and no database


@pytest.mark.launch
def test_what_will_fail_is_said_with_status_1(
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("", 0)) as other:
        monkeypatch.setenv("MASTER_PORT", str(other.getsockname()[1]))
        status, found = doctor(
            images,
            tmp_path / "run",
            f"tracking.uri=http://127.0.0.1:{free_port()}",
            "train.micro_batch_size=65536",
            "data.prefetch=100",
            "data.workers=1",
            f"eval.data={tmp_path}/none",
            "eval.every=5",
            "checkpoint.every=1",
            "checkpoint.keep=1000000",
            "train.steps=100000000",
            capsys=capsys,
        )
    assert status == 1
    fail = {name for name, line in found.items() if line.startswith("will fail|")}
    assert fail == {"memory", "eval.data", "checkpoints", "port"}
    assert found["mlflow server"].startswith("slow or late|")


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        (["train.steps=0"], "train.steps"),
        (["tracking.registered_name=team/seer"], "tracking.registered_name=team-seer"),
        (["sharding.sync_bn_group_size=64"], "sharding.sync_bn_group_size"),
        (["objective.no_such_option=1"], "no_such_option"),
    ],
)
def test_keys_that_cannot_be_trained_are_one_sentence(
    images: Path, tmp_path: Path, keys: list[str], sentence: str
) -> None:
    recipe, *rest = arguments(images, tmp_path / "run", *keys)[1:]
    with pytest.raises(ConfigError, match=sentence):
        main(["--run", recipe, "--ranks", "2", *rest])
    with pytest.raises(ConfigError, match="no recipe"):
        main(["--run", "no-such-recipe"])


def test_a_deepspeed_file_is_taken(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(ROOT / "ds_configs" / "zero2.json")
    status, found = doctor(images, tmp_path / "run", "--deepspeed_config", file, capsys=capsys)
    assert status == 0, found
    with pytest.raises(ConfigError, match="cannot read the DeepSpeed config"):
        doctor(images, tmp_path / "run", "--deepspeed_config", "none.json", capsys=capsys)
