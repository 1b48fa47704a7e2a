"""Two hosts on one machine: network namespaces that meet by torchrun, until one is cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.jobs import ROOT, arguments, lines, write_images

pytestmark = [pytest.mark.launch, pytest.mark.slow]

HOSTS = ("seer-host-1", "seer-host-2")
ADDRESSES = ("10.213.7.1", "10.213.7.2")
LINK = "seer0"  # the device in every namespace


def ip(*words: str, check: bool = True) -> bool:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.returncode == 0


@pytest.fixture
def hosts() -> Iterator[None]:
    """Two namespaces joined by a cable, each with its own loopback device."""
    try:
        permitted = ip("netns", "add", HOSTS[0], check=False)
    except FileNotFoundError:
        pytest.skip("needs iproute2's `ip`")
    if not permitted:
        pytest.skip("needs the right to add network namespaces")
    try:
        ip("netns", "add", HOSTS[1])
        ends = ("netns", HOSTS[0], "type", "veth", "peer", "name", LINK, "netns", HOSTS[1])
        ip("link", "add", LINK, *ends)
        for host, address in zip(HOSTS, ADDRESSES, strict=True):
            ip("-n", host, "address", "add", f"{address}/24", "dev", LINK)
            for device in ("lo", LINK):
                ip("-n", host, "link", "set", device, "up")
        yield
    finally:
        for host in HOSTS:
            ip("netns", "delete", host, check=False)


def start(host: int, argv: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """What docs/clusters.md says to type on every node."""
    # A machine knows by its name whether the endpoint is its own; these two have one name.
    command = [
        *("ip", "netns", "exec", HOSTS[host], sys.executable, "-m", "torch.distributed.run"),
        *("--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "3"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500"),
        *("--rdzv-id", "two-hosts", "--rdzv-conf", f"is_host={1 - host},last_call_timeout=15"),
        *("--local-addr", ADDRESSES[host], "-m", "seer_scale", "pretrain", *argv),
    ]
    with (folder / f"host{host}.log").open("wb") as log:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def worlds(run_dir: Path) -> set[int]:
    """Numbers of ranks that the run's checkpoints were written by."""
    import json

    manifests = sorted(run_dir.glob("checkpoints/step_*/manifest.json"))
    return {json.loads(path.read_text())["world_size"] for path in manifests}


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("hosts")
def test_a_host_that_is_cut_off_is_gone_on_without(tmp_path: Path) -> None:
    run_dir, steps = tmp_path / "run", 120
    argv = arguments(
        write_images(tmp_path / "images"),
        run_dir,
        *(f"train.steps={steps}", "checkpoint.every=5", "checkpoint.keep=100"),
        "run.hang_minutes=0.25",
    )
    processes = [start(host, [*argv, "--resume", "auto"], tmp_path) for host in (0, 1)]

    def logs() -> str:
        return "\n".join((tmp_path / f"host{n}.log").read_text()[-6000:] for n in (0, 1))

    try:
        deadline = time.monotonic() + 240
        while worlds(run_dir) != {2} or len(lines(run_dir)) < 12:
            assert processes[0].poll() is None, logs()
            assert time.monotonic() < deadline, logs()
            time.sleep(0.2)
        ip("-n", HOSTS[1], "link", "set", LINK, "down")
        cut = lines(run_dir)[-1]["step"]
        assert cut < steps - 20, "the run was nearly over before the link was cut"
        assert processes[0].wait(500) == 0, logs()
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert worlds(run_dir) == {1, 2}
    trained = [line["step"] for line in lines(run_dir)]
    assert trained[-1] == steps
    # Every step is there, and what was done twice is what came after the last checkpoint.
    assert sorted(set(trained)) == list(range(1, steps + 1))
    assert len(trained) - steps <= 10
