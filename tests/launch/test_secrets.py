"""Passwords, tokens and signatures of a whole run: nowhere in its folder, its log, or MLflow."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from harness.jobs import RECIPES, ROOT, arguments, write_images
from seer_scale.config.recipe import parse
from seer_scale.train import build
from tests.data.servers import FileServer

pytestmark = pytest.mark.launch

SECRETS = {
    "AWS_ACCESS_KEY_ID": "AKIAsecretone",
    "AWS_SECRET_ACCESS_KEY": "secrettwo",
    "AWS_SESSION_TOKEN": "secretthree",
    "MLFLOW_TRACKING_PASSWORD": "secretfour",
    "MLFLOW_TRACKING_TOKEN": "secretfive",
    "HF_TOKEN": "secretsix",
}
IN_ADDRESSES = ("secretseven", "secreteight", "secretnine", "secretten")


def test_a_public_configuration_has_no_secrets() -> None:
    argv = arguments(
        "https://user:secretseven@host/a.tar?X-Amz-Signature=secreteight",
        Path("runs/x"),
        "tracking.uri=http://user:secretnine@host:5000",
        "eval.data=https://user:secretten@host/train.tar,https://user:secretten@host/val.tar",
    )
    config = parse(argv, recipes=RECIPES, ranks=1).config
    shown = build.public(config).model_dump_json()
    assert not [secret for secret in IN_ADDRESSES if secret in shown]
    assert "https://host/a.tar" in shown
    assert config.data.path.startswith("https://user:secretseven@")  # the run itself has them
    plain = parse(arguments("photographs", Path("runs/x")), recipes=RECIPES, ranks=1).config
    assert build.public(plain) == plain


@pytest.mark.long
def test_no_secret_of_a_run_is_written_anywhere(tmp_path: Path) -> None:
    images = sorted(write_images(tmp_path / "images").rglob("*.jpg"))
    (tmp_path / "served").mkdir()
    with tarfile.open(tmp_path / "served" / "s.tar", "w") as tar:
        for image in images:
            tar.add(image, image.name)
        (tmp_path / "bad.jpg").write_bytes(b"no image")
        tar.add(tmp_path / "bad.jpg", "bad.jpg")  # its name, with the address, is recorded
    server = FileServer(tmp_path / "served")
    address = f"http://user:secretseven@127.0.0.1:{server.port}/s.tar?X-Amz-Signature=secreteight"
    database = f"sqlite:///{tmp_path}/mlflow.db"
    argv = arguments(
        address,
        tmp_path / "run",
        f"tracking.uri={database}",
        f"data.cache_dir={tmp_path}/cache",
    )
    command = [sys.executable, str(ROOT / "launch" / "pretrain.py"), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **SECRETS}
    try:
        said = ""
        for more in (["train.steps=4"], ["data.prefetch=3", "--resume", "auto"]):
            done = subprocess.run(
                [*command, *more],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=240,
                check=False,
            )
            assert done.returncode == 0, done.stdout
            said += done.stdout
        wrong = [*command[:2], *arguments(address.replace("s.tar", "t.tar"), tmp_path / "other")]
        done = subprocess.run(wrong, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 1
        said += done.stdout + done.stderr
    finally:
        server.stop()
    assert "t.tar" in said
    assert "resumed with values that differ" in said
    assert (tmp_path / "run" / "bad_samples.jsonl").exists()
    secrets = [*SECRETS.values(), *IN_ADDRESSES]
    assert not [secret for secret in secrets if secret in said]
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(path.name == "config.yaml" for path in written)
    assert any("mlflow.db" in path.name and path.stat().st_size for path in written)
    for path in written:
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in data], path
