"""Makes one small specimen of everything that the package writes and must go on reading.

The archive beside this file was made once, at commit fa077d9 (version 0.1.0, before the modules
moved into folders), with torch 2.13 on a CPU, and is not made anew when the code changes:
tests/test_specimens.py shows that today's code still reads it. To replace it, remove
/tmp/seer-specimens, check out the commit whose files are to be kept, and run

    OMP_NUM_THREADS=1 python -m tests.specimens.make

Only launch/*.py, `seer_scale.load` and mlflow are used, as a user would. What comes out:

    images/                 24 + 12 labelled images; shards/: the first part as tars, and a manifest
    study.yaml, study/      a study with one finished point of two, whose run (ddp, 2 ranks, queue)
                            has a checkpoint, records and an evaluation
    mlflow.db, mlartifacts/ the tracking store of that run, with a checkpoint and a registered model
    runs/evaluations/       the features that the evaluation computed
    zero2/                  a run under ZeRO 2 on 2 ranks; its server was away, so nothing is sent
    finetuned/              a fine-tuning that was killed after an epoch
    exports/                the trunk in every format that `convert` reads, one of them with a head
                            file; without timm, which has no trunk so small
    expected/               images and their features; expected.json: what this commit computes when
                            it goes on from these files

Everything lies in one compressed archive, cut into parts of less than a megabyte: the same weights
stand in many of the files, and a compressor keeps them once. `cat specimens.tar.xz.* | tar xJ`
unpacks it.
"""

from __future__ import annotations

import contextlib
import io
import json
import lzma
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MADE_IN = Path("/tmp/seer-specimens")
PART_BYTES = 900_000
MODEL = "specimens-regnety_debug"
POINT = "regnety_debug-swav-16-seed0"
RUN = f"study/runs/{POINT}"
TRUNKS = {
    "run": RUN,
    "checkpoint": f"{RUN}/checkpoints/step_00000004",
    "safetensors": "exports/safetensors",
    "vissl": "exports/vissl.torch",
    "huggingface": "exports/huggingface",
    "torchvision": "exports/torchvision.pth",
    "with_head": "exports/with_head",
}
STUDY: dict[str, Any] = {
    "name": "specimens",
    "recipe": "debug",
    "sizes": ["regnety_debug", "regnety_200mf"],
    "images": [16],
    "global_batch": 4,
    "processes": 2,
    "retries": 0,
    "set": {
        "run.log_samples": True,
        "model.head_dims": [8, 8],
        "model.prototypes": 6,
        "objective.queue_length": 8,
        # Large steps without LARC: a lost momentum or queue would change the next losses.
        "optim.larc": False,
        "optim.lr": 0.05,
        "data.path": "shards/shards.jsonl",
        "data.crop_sizes": [32],
        "data.crop_counts": [2],
        "data.crop_scales": [[0.3, 1.0]],
        "tracking.uri": "sqlite:///mlflow.db",
        "tracking.checkpoints": "copy",
    },
    "evaluate": {"data": "images", "tasks": {"knn": {"size": 32, "k": [3]}}},
}
KNN = ("knn", "--model", RUN, "--data", "images", "--mlflow-uri", "none", "size=32", "k=[3]")
FINETUNE = (
    *("finetune", "--model", RUN, "--data", "images", "--out", "finetuned", "--mlflow-uri", "none"),
    *("epochs=3", "batch=4", "size=32", "base_lr=0.5", "lr_steps=[2]", "freeze=2", "workers=1"),
)
# Going on from the specimens, by name: ranks and arguments of launch/pretrain.py, and the run.
GOING_ON = {
    "ddp": (2, ("--recipe", f"{RUN}/config.yaml", "tracking.log_models=false"), RUN),
    "zero2": (2, ("--recipe", "zero2/config.yaml", "tracking.enabled=false"), "zero2"),
    "mlflow": (
        1,
        ("--recipe", f"{RUN}/config.yaml", "train.micro_batch_size=4", "tracking.log_models=false"),
        "again",
    ),
}
MORE_STEPS = 7


def launch(script: str, *arguments: str, ranks: int = 1, kill_at: Path | None = None) -> str:
    """Runs a script of launch/ in the current folder; returns all that it printed.

    Args:
        script: the script's name without its suffix.
        arguments: the rest of the command line.
        ranks: processes, by torchrun if more than one.
        kill_at: kills the script as soon as this file exists.
    """
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command += [str(ROOT / "launch" / f"{script}.py"), *arguments]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        if kill_at is not None:
            while not kill_at.exists() and process.poll() is None:
                time.sleep(0.005)
            process.kill()
        said, _ = process.communicate(timeout=280)
    if process.returncode != (0 if kill_at is None else -signal.SIGKILL):
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{said}")
    return said


def unpack(folder: Path) -> Path:
    """Unpacks the specimens into a folder, whose path replaces the one they were made in.

    The manifests of checkpoints are left as they are: each holds a checksum of its own text.
    """
    with tarfile.open(fileobj=io.BytesIO(_archive())) as archive:
        archive.extractall(folder, filter="data")
    old, new = str(MADE_IN), str(folder)
    for path in folder.rglob("*"):
        if path.suffix in {".json", ".jsonl", ".yaml", ".txt"} and path.name != "manifest.json":
            text = path.read_text()
            if old in text:
                stamp = path.stat().st_mtime_ns
                path.write_text(text.replace(old, new))
                os.utime(path, ns=(stamp, stamp))
    _move_database(folder / "mlflow.db", old, new)
    return folder


@cache
def _archive() -> bytes:
    parts = [path.read_bytes() for path in sorted(HERE.glob("specimens.tar.xz.*"))]
    return lzma.decompress(b"".join(parts))


def go_on(name: str, run_id: str) -> dict[str, Any]:
    """Resumes a run of `GOING_ON` in the current folder; returns the losses and samples after it.

    Args:
        name: key of `GOING_ON`.
        run_id: id of the MLflow run.
    """
    ranks, arguments, run_dir = GOING_ON[name]
    resume = f"mlflow:{run_id}" if name == "mlflow" else "auto"
    launch(
        "pretrain",
        *(*arguments, f"run.dir={run_dir}", f"train.steps={MORE_STEPS}", "--resume", resume),
        ranks=ranks,
    )
    losses = [line["loss"] for line in read_lines(Path(run_dir, "metrics.jsonl"))]
    samples = read_lines(Path(run_dir, "samples.jsonl"))
    return {"losses": losses, "samples": samples}


def fine_tune() -> list[float]:
    """Goes on with the fine-tuning in the current folder; returns the loss of every epoch."""
    said = launch("evaluate", *FINETUNE)
    if "resuming after epoch 1 of" not in said:
        raise RuntimeError(f"the fine-tuning began anew:\n{said}")
    report = json.loads(Path("finetuned/finetune.json").read_text())
    losses: list[float] = report["details"]["loss_per_epoch"]
    return losses


def read_lines(path: Path) -> list[Any]:
    """The objects in a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def make() -> None:
    """Makes the specimens in `MADE_IN` and packs them."""
    MADE_IN.mkdir()
    os.chdir(MADE_IN)
    launch("shapes", "images", "--train", "24", "--val", "12", "--size", "40")
    for path in Path("images").rglob("*.png"):
        os.utime(path, (1_700_000_000, 1_700_000_000))  # part of the features' identity
    _write_shards(Path("shards"), sorted(Path("images/train").rglob("*.png")))
    launch("data", "index", f"{MADE_IN}/shards/*.tar", "--out", "shards/shards.jsonl")

    Path("study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    launch("scaling_study", "--study", "study.yaml", "--out", "study", "--point", "0")
    zero2 = STUDY["set"] | {
        "run.dir": "zero2",
        "train.steps": 4,
        "train.micro_batch_size": 2,
        "checkpoint.keep": 1,
        "tracking.uri": "http://127.0.0.1:9",
        "tracking.checkpoints": "none",
    }
    launch(
        *("pretrain", "--recipe", "debug", "--deepspeed_config", "ds_configs/zero2.json"),
        *(f"{key}={json.dumps(value)}" for key, value in zero2.items()),
        ranks=2,
    )
    _write_fine_tuning()
    for layout, out in list(TRUNKS.items())[2:-1]:
        launch("convert", RUN, "--to", layout, "--out", out)
    _write_head()
    _write_features()
    _wait_for_senders()
    pack()
    _write_expected()


def pack() -> None:
    """Writes the archive from `MADE_IN`, without what names this machine."""
    for path in MADE_IN.rglob("lock"):
        path.unlink()
    shutil.rmtree(MADE_IN / "study/logs")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(MADE_IN.rglob("*")):
            entry = archive.gettarinfo(path, str(path.relative_to(MADE_IN)))
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = ""
            entry.mtime = int(entry.mtime)
            archive.addfile(entry, path.open("rb") if path.is_file() else None)
    if str(ROOT).encode() in buffer.getvalue():
        raise RuntimeError(f"a file in {MADE_IN} names the folder of this clone")
    packed = lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME)
    for old in HERE.glob("specimens.tar.xz.*"):
        old.unlink()
    for number, start in enumerate(range(0, len(packed), PART_BYTES)):
        part = HERE / f"specimens.tar.xz.{number:02d}"
        part.write_bytes(packed[start : start + PART_BYTES])


def _write_shards(folder: Path, images: list[Path]) -> None:
    folder.mkdir()
    for number in range(2):
        with tarfile.open(folder / f"shard-{number:06d}.tar", "w") as archive:
            for path in images[number::2]:
                archive.add(path, f"{path.stem}-{path.parent.name}.png", filter=_plain)


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry


def _write_fine_tuning() -> None:
    """Kills a fine-tuning as soon as its first epoch is saved."""
    saved = Path("finetuned/checkpoints/step_00000001")
    launch("evaluate", *FINETUNE, kill_at=saved)
    losses = json.loads((saved / "manifest.json").read_text())["state"]["losses"]
    if len(losses) != 1:  # the next epoch ended before the save did
        raise RuntimeError(f"the checkpoint of epoch 1 holds the losses of {len(losses)} epochs")


def _write_head() -> None:
    """A trunk with a classifier, which `convert` puts into a head file."""
    import torch

    state = torch.load("exports/torchvision.pth", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    state |= {
        "fc.weight": torch.randn(3, 152, generator=generator),
        "fc.bias": torch.randn(3, generator=generator),
    }
    torch.save(state, "classifier.pth")
    launch("convert", "classifier.pth", "--to", "safetensors", "--out", "exports/with_head")
    Path("classifier.pth").unlink()


def _write_features() -> None:
    """Two images, and their features by the checkpoint's trunk."""
    import torch

    import seer_scale

    Path("expected").mkdir()
    images = np.random.default_rng(0).standard_normal((2, 3, 32, 32), dtype=np.float32)
    with torch.inference_mode():
        features = seer_scale.load(TRUNKS["checkpoint"])(torch.from_numpy(images)).numpy()
    np.save("expected/images.npy", images)
    np.save("expected/features.npy", features)


def _wait_for_senders() -> None:
    """A sender that cannot reach its server tries for a minute after the run."""
    log = Path("zero2/tracking/sender.log")
    while "are left for" not in log.read_text():
        time.sleep(1)


def _write_expected() -> None:
    """Goes on from fresh copies, and writes down what comes of it."""
    run_id = json.loads(Path(RUN, "tracking/sent.json").read_text())["run_id"]
    expected: dict[str, Any] = {"run_id": run_id}
    result = Path("study/evaluations", POINT, "knn.json")
    expected["knn"] = json.loads(result.read_text())["metrics"]
    for name in (*GOING_ON, "finetune"):
        with tempfile.TemporaryDirectory() as copy, contextlib.chdir(unpack(Path(copy))):
            expected[name] = fine_tune() if name == "finetune" else go_on(name, run_id)
    (HERE / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def _move_database(path: Path, old: str, new: str) -> None:
    """Replaces a folder's path in every text of a database: MLflow keeps whole addresses."""
    with sqlite3.connect(path) as database:
        tables = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for (table,) in tables:
            for _, column, kind, *_ in database.execute(f'PRAGMA table_info("{table}")').fetchall():
                if "CHAR" in kind or "TEXT" in kind:
                    database.execute(
                        f'UPDATE "{table}" SET "{column}" = replace("{column}", ?, ?) '
                        f'WHERE instr("{column}", ?)',
                        (old, new, old),
                    )
    database.close()


if __name__ == "__main__":
    make()
