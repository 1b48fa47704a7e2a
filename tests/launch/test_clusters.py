"""SLURM, Kubernetes and hostfile: the scripts as they are, executed or read, without a cluster."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from harness.jobs import RECIPES, ROOT, arguments, lines, write_images
from seer_scale.config.recipe import parse
from seer_scale.distributed.ports import free_port
from seer_scale.errors import LOST_RANK_STATUS, REQUEUE_STATUS
from seer_scale.train.build_engine import check_run

SBATCH = ROOT / "launch" / "slurm" / "pretrain.sbatch"
JOB = ROOT / "launch" / "k8s" / "pytorchjob.yaml"
CLAIMS = JOB.with_name("claims.yaml")
BIN = Path(sys.executable).parent

# Runs the command as often as SLURM would, here, and leaves with the highest status, as srun does.
SRUN = """#!/bin/bash
tasks=$SLURM_NTASKS
while [[ "$1" == --* ]]; do
  [[ "$1" == --ntasks=* ]] && tasks=${1#*=}
  shift
done
status=0 pids=()
for ((rank = 0; rank < tasks; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
  pids+=($!)
done
echo "${pids[@]}" > "$CLUSTER/tasks"
for pid in "${pids[@]}"; do
  wait "$pid"
  one=$?
  (( one > status )) && status=$one
done
exit $status
"""
SCONTROL = """#!/bin/bash
case "$1" in
  show) echo 127.0.0.1 ;;
  requeue) echo "$2" >> "$CLUSTER/requeued" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job of one node with two tasks."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    port = free_port()
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW", "RANK"))},
        "PATH": f"{tmp_path}/bin:{BIN}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "CLUSTER": str(tmp_path),
        "TMPDIR": str(tmp_path),
        "SLURM_JOB_ID": str(port - 20000),
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }


def submit(environment: dict[str, str], argv: list[str], log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as file:
        return subprocess.Popen(
            ["bash", str(SBATCH), *argv],
            env=environment,
            cwd=environment["CLUSTER"],
            stdout=file,
            stderr=subprocess.STDOUT,
        )


@pytest.mark.long
@pytest.mark.launch
def test_a_job_that_is_told_to_stop_saves_and_queues_itself(
    tmp_path: Path, cluster: dict[str, str]
) -> None:
    """SIGUSR1 to every task, as SLURM sends it; started again the job goes on to its end."""
    images, run_dir, log = write_images(tmp_path / "images"), tmp_path / "run", tmp_path / "job.log"

    def argv(steps: int) -> list[str]:
        return arguments(images, run_dir, f"train.steps={steps}", "checkpoint.every=1000")

    job = submit(cluster, argv(400), log)
    deadline = time.monotonic() + 200
    while not (run_dir / "metrics.jsonl").exists() or len(lines(run_dir)) < 3:
        assert job.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    for pid in (tmp_path / "tasks").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)
    assert job.wait(100) == REQUEUE_STATUS, log.read_text()
    assert (tmp_path / "requeued").read_text().split() == [cluster["SLURM_JOB_ID"]]
    stopped = lines(run_dir)[-1]["step"]
    assert 3 <= stopped < 400
    assert (run_dir / "checkpoints" / f"step_{stopped:08d}" / "manifest.json").is_file()
    assert submit(cluster, argv(stopped + 2), log).wait(200) == 0, log.read_text()
    assert [line["step"] for line in lines(run_dir)] == list(range(1, stopped + 3))
    assert len((tmp_path / "requeued").read_text().split()) == 1


def test_a_mistake_does_not_queue_the_job_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    log = tmp_path / "job.log"
    assert submit(cluster, ["--recipe", "nothing"], log).wait(100) == 2
    assert "error: there is no recipe 'nothing'" in log.read_text()
    assert not (tmp_path / "requeued").exists()


def test_a_lost_rank_queues_the_job_again(tmp_path: Path, cluster: dict[str, str]) -> None:
    """Whatever ends with that status, since a rank that is lost takes minutes to be missed."""
    (tmp_path / "bin" / "python").write_text(f"#!/bin/sh\nexit {LOST_RANK_STATUS}\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    assert submit(cluster, [], tmp_path / "job.log").wait(20) == LOST_RANK_STATUS
    assert (tmp_path / "requeued").exists()


def test_ranks_run_in_the_container(tmp_path: Path, cluster: dict[str, str]) -> None:
    for name, text in (
        ("box", 'echo "$RANK: $*" >> "$CLUSTER/boxed"; shift 2; exec "$@"'),
        ("python", ":"),
    ):
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    environment = cluster | {"CONTAINER": "box exec image.sif"}
    assert submit(environment, ["a b"], tmp_path / "job.log").wait(20) == 0
    started = sorted((tmp_path / "boxed").read_text().splitlines())
    command = "exec image.sif python -m seer_scale pretrain a b --resume auto"
    assert started == [f"0: {command}", f"1: {command}"]


def test_ranks_get_the_cores_that_were_asked_for(tmp_path: Path, cluster: dict[str, str]) -> None:
    """srun does not read sbatch's --cpus-per-task from SLURM_CPUS_PER_TASK."""
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "cores: $SRUN_CPUS_PER_TASK"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    log = tmp_path / "job.log"
    assert submit(cluster | {"SLURM_CPUS_PER_TASK": "8"}, [], log).wait(20) == 0
    assert log.read_text() == 2 * "cores: 8\n"


def test_tars_are_staged_whole_and_once(tmp_path: Path, cluster: dict[str, str]) -> None:
    shards, log = tmp_path / "shards", tmp_path / "job.log"
    shards.mkdir()
    for number in range(3):
        (shards / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    here = tmp_path / f"seer-scale-{cluster['SLURM_JOB_ID']}"
    here.mkdir()
    (here / "1.tar.part").write_bytes(b"cut short")  # by a job that was ended while it copied
    (here / "2.tar").write_bytes(b"there already")
    job = submit(cluster | {"STAGE": str(shards)}, ["--recipe", "debug"], log)
    assert job.wait(20) == 0, log.read_text()
    assert sorted(path.name for path in here.iterdir()) == ["0.tar", "1.tar", "2.tar"]
    assert (here / "1.tar").read_bytes() == bytes([1]) * 1000
    assert (here / "2.tar").read_bytes() == b"there already"
    started = f"-m seer_scale pretrain --recipe debug data.path={here} --resume auto\n"
    assert log.read_text() == 2 * started


def test_what_cannot_be_staged_ends_the_job(tmp_path: Path, cluster: dict[str, str]) -> None:
    log = tmp_path / "job.log"
    assert submit(cluster | {"STAGE": str(tmp_path / "no")}, [], log).wait(20) == 1
    assert "could not be copied to" in log.read_text()


def test_shellcheck_has_nothing_to_say() -> None:
    files = [SBATCH, ROOT / ".ci" / "run"]
    done = subprocess.run([BIN / "shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_script_knows_the_exit_statuses() -> None:
    text = SBATCH.read_text()
    assert f"SAVED={REQUEUE_STATUS} LOST_RANK={LOST_RANK_STATUS} " in text
    assert "#SBATCH --signal=USR1@" in text
    assert "#SBATCH --requeue" in text


def test_the_pytorchjob_is_one() -> None:
    """Its shape, what the operator needs of it, and arguments that this version takes."""
    job: dict[str, Any] = yaml.safe_load(JOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    spec = job["spec"]
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    elastic = spec["elasticPolicy"]
    assert elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert worker["restartPolicy"] == "OnFailure"  # ExitCode would take 75 for a lasting error
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert int(spec["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounted) == {volume["name"] for volume in pod["volumes"]}
    assert mounted["shared-memory"] == "/dev/shm"
    built = re.search(r"docker build -t (\S+) ", (ROOT / "docs" / "containers.md").read_text())
    assert built
    assert container["image"] == built[1]
    claims = {claim["metadata"]["name"]: claim for claim in yaml.safe_load_all(CLAIMS.read_text())}
    named = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
    assert {claim["claimName"] for claim in named} == set(claims)
    for claim in claims.values():  # every pod writes into runs, and somebody into data
        assert (claim["apiVersion"], claim["kind"]) == ("v1", "PersistentVolumeClaim")
        assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    command = [*container["command"], *container["args"]]
    assert command[:4] == ["torchrun", "-m", "seer_scale", "pretrain"]
    parsed = parse(command[4:], recipes=RECIPES, ranks=1)
    ranks = int(spec["nprocPerNode"])
    for nodes in range(elastic["minReplicas"], elastic["maxReplicas"] + 1):
        check_run(parsed.config, None, world_size=nodes * ranks, local_world_size=ranks, cuda=True)
    # torchrun kills ranks before Kubernetes kills the pod, and not after its default of 30 s.
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    patience = int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"])
    assert 30 < patience < pod["terminationGracePeriodSeconds"]
    assert parsed.resume == "auto"
    assert Path(parsed.config.run.dir).is_relative_to(mounted["runs"])
    assert Path(parsed.config.data.path).is_relative_to(mounted["data"])


def test_the_hostfile_of_the_docs_is_one_for_deepspeed(tmp_path: Path) -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    text = (ROOT / "docs" / "clusters.md").read_text()
    (block,) = re.findall(r"```\n((?:\S+ slots=\d+\n)+)```", text)
    (tmp_path / "hostfile").write_text(block)
    assert fetch_hostfile(str(tmp_path / "hostfile")) == {"node1": 8, "node2": 8}
