"""Whole runs on bad data: hundreds of broken files, and servers that are slow, cut off or away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import boto3
import numpy as np
import pytest

from harness.jobs import ROOT, arguments, lines, write_images
from tests.data.broken_files import write_broken
from tests.data.servers import BadNetwork, FileServer, S3Server

pytestmark = pytest.mark.launch

SHARDS, IMAGES = 6, 8  # and images per shard


def pretrain(argv: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "pretrain.py"), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> str:
    """What a run that has to succeed said."""
    said = process.communicate(timeout=240)[0]
    assert process.returncode == 0, said
    return said


@pytest.mark.long
def test_hundreds_of_broken_files_in_a_shard(tmp_path: Path) -> None:
    """Every one is named with its cause, batches stay full, and the run ends as it should."""
    folder = tmp_path / "files"
    write_images(folder, 80)
    causes = write_broken(folder, np.random.default_rng(0))
    assert len(causes) >= 300
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    with tarfile.open(tmp_path / "wild.tar", "w") as tar:
        for path in files:
            tar.add(path, path.name)
    batch, run_dir = 16, tmp_path / "run"
    # four of five are broken: all of them come up where 16 of about 380 + 80 are looked at a step
    steps = -(-len(files) // batch)
    argv = arguments(
        tmp_path / "wild.tar",
        run_dir,
        *(f"train.steps={steps}", f"train.micro_batch_size={batch}", "data.workers=2"),
        *("run.log_samples=true", "data.max_bad_fraction=1", "optim.base_lr=0.01"),
    )
    said = ended(pretrain(argv))
    named = {Path(line["name"]).name: line["cause"] for line in lines(run_dir, "bad_samples.jsonl")}
    assert named == causes
    assert all(len(line["samples"]) == batch for line in lines(run_dir, "samples.jsonl"))
    assert len(lines(run_dir)) == steps
    assert "images that could not be used and were replaced" in said


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    images = sorted(write_images(folder / "images", SHARDS * IMAGES).rglob("*.jpg"))
    for number in range(SHARDS):
        with tarfile.open(folder / f"{number}.tar", "w") as tar:
            for image in images[IMAGES * number : IMAGES * (number + 1)]:
                tar.add(image, image.name)
    shutil.rmtree(folder / "images")
    return folder


def run_on(path: str, run_dir: Path, cache: Path, size: int) -> list[str]:
    return arguments(
        path,
        run_dir,
        *("train.steps=16", "train.micro_batch_size=8", "data.workers=2", "data.prefetch=1"),
        *("run.log_samples=true", "data.window=1", "optim.base_lr=0.01"),
        # room for two shards of six: all are fetched again and again
        *(f"data.cache_dir={cache}", f"data.cache_gib={2.5 * size / 2**30:.9f}"),
    )


@pytest.fixture(scope="module")
def expected(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The ids of a run on the local shards."""
    folder = tmp_path_factory.mktemp("local")
    size = (shards / "0.tar").stat().st_size
    ended(pretrain(run_on(str(shards / "{0..5}.tar"), folder / "run", folder / "cache", size)))
    return [line["samples"] for line in lines(folder / "run", "samples.jsonl")]


@pytest.fixture(params=["http", "s3"])
def remote(
    request: pytest.FixtureRequest, shards: Path
) -> Iterator[tuple[BadNetwork, str, dict[str, str]]]:
    """A real server behind a bad network: the network, the shards' address, the environment."""
    server = FileServer(shards) if request.param == "http" else S3Server()
    network = BadNetwork(server.port)
    here = f"http://127.0.0.1:{network.port}"
    if request.param == "http":
        yield network, f"{here}/{{0..5}}.tar", {}
    else:
        keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{server.port}",
            region_name="us-east-1",
            aws_access_key_id="a",
            aws_secret_access_key="b",
        )
        client.create_bucket(Bucket="wild")
        for path in shards.glob("*.tar"):
            client.upload_file(str(path), "wild", path.name)
        environment = {"AWS_ENDPOINT_URL": here, "AWS_DEFAULT_REGION": "us-east-1", **keys}
        yield network, "s3://wild/{0..5}.tar", environment
    network.stop()
    server.stop()


@pytest.mark.long
def test_a_run_outlives_its_servers(
    remote: tuple[BadNetwork, str, dict[str, str]],
    expected: list[list[int]],
    shards: Path,
    tmp_path: Path,
) -> None:
    """Throttled, cut off and restarted in mid-run: no sample is lost or repeated."""
    network, address, environment = remote
    size = (shards / "0.tar").stat().st_size
    run_dir = tmp_path / "run"
    network.bytes_per_second = 400_000
    network.cut_every = 3 * size // 2
    process = pretrain(run_on(address, run_dir, tmp_path / "cache", size), **environment)
    done = threading.Event()

    def disturb() -> None:
        """Away for a second after every fourth step."""
        seen = 0
        while not done.wait(0.01):
            records = run_dir / "samples.jsonl"
            now = records.read_text().count("\n") if records.exists() else 0
            if now >= seen + 4:
                seen = now
                network.stop()
                time.sleep(1)
                network.start()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        ended(process)
    finally:
        done.set()
        thread.join()
        process.kill()
    assert [line["samples"] for line in lines(run_dir, "samples.jsonl")] == expected
    assert not (run_dir / "bad_samples.jsonl").exists()
    assert network.breaks > 0
