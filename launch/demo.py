"""The main job end to end: real photographs, two processes, a registered model, a kNN figure.

`make demo` runs it. It only calls what users call: `deepspeed launch/pretrain.py` and the library.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from seer_scale.distributed.ports import free_port  # noqa: E402
from seer_scale.errors import UserError, exit_with  # noqa: E402

DATA = Path("data/demo")
CROP = 96  # pixels; the tiles' size
NEIGHBOURS = 20
SENDER_SECONDS = 90.0


def fresh_folder(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3` ... that does not exist: runs are kept."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def processes() -> int:
    """One per GPU, else one per core up to two: the recipe's batch is meant for two."""
    import torch

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


def pretrain(run_dir: Path) -> None:
    """Runs the recipe as a user would, in processes of its own."""
    command = [
        *("deepspeed", "--quiet", "--num_gpus", str(processes())),
        *("--master_port", str(free_port()), "launch/pretrain.py"),
        *("--recipe", "demo", "--deepspeed_config", "ds_configs/zero2.json", f"run.dir={run_dir}"),
    ]
    print("$", " ".join(command), flush=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode != 0:
        raise UserError(f"the training failed; {run_dir} holds what it wrote")


def nearest_neighbours(trunk: Any) -> float:
    """kNN top-1 of a trunk's features: tiles of regions that training never saw, as queries."""
    from seer_scale.data import open_source
    from seer_scale.evaluation.features import extract_features
    from seer_scale.evaluation.tasks.knn import knn_top1

    bank = extract_features(trunk, open_source(DATA / "knn_train"), size=CROP)
    queries = extract_features(trunk, open_source(DATA / "knn_test"), size=CROP)
    return knn_top1(*bank, *queries, k=NEIGHBOURS)


def starting_point(run_dir: Path) -> Any:
    """The trunk as it was before the first step."""
    import torch

    from seer_scale.config.recipe import parse
    from seer_scale.models import initialise
    from seer_scale.train import build

    config = parse(["--recipe", str(run_dir / "config.yaml")], recipes=ROOT, ranks=1).config
    model = build.model_of(config, torch.device("cpu"))
    initialise(model, config.run.seed)
    return model.trunk.eval()


def send_rest(run_dir: Path) -> None:
    """Sends what MLflow lacks, once the sender beside the training has ended."""
    from seer_scale.tracking import Tracker
    from seer_scale.tracking.sender import sync

    tracker, deadline = Tracker(run_dir), time.monotonic() + SENDER_SECONDS
    while tracker.sender_alive() and time.monotonic() < deadline:
        time.sleep(0.2)
    sync(run_dir)


def report(run_dir: Path, accuracy: dict[str, float], seconds: float) -> None:
    """The closing table and what to type next."""
    from seer_scale.tracking import Tracker
    from seer_scale.tracking.mlflow_client import newest_version
    from seer_scale.tracking.records import METRICS, read_lines
    from seer_scale.tracking.uri import redact, resolve_uri

    lines = [line for line in read_lines(run_dir / METRICS) if "loss" in line]
    tail = lines[len(lines) // 2 :]
    speed = sorted(line["images_per_second"] for line in tail)[len(tail) // 2]
    version = newest_version("seer-demo", resolve_uri())
    rows = [
        ("loss, first -> last step", f"{lines[0]['loss']:.4f} -> {lines[-1]['loss']:.4f}"),
        ("kNN top-1, random trunk", f"{accuracy['knn_top1_random']:.1%}"),
        ("  with BatchNorm measured", f"{accuracy['knn_top1_random_measured']:.1%}"),
        ("kNN top-1, trained trunk", f"{accuracy['knn_top1']:.1%}"),
        ("images/s (median)", f"{speed:.0f} on {processes()} processes"),
        ("peak memory", f"{max(line['peak_memory_gib'] for line in lines):.2f} GiB a process"),
        ("training time", f"{seconds:.0f} s, {len(lines)} steps"),
        ("curve", str(run_dir / "curve.png")),
        ("MLflow run", str(Tracker(run_dir).run_id)),
        ("registered model", f"seer-demo, version {version.number} ({', '.join(version.aliases)})"),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"  {name:<{width}}   {value}" for name, value in rows))
    print(f"""
See the run and the model:
  .venv/bin/mlflow server --host 127.0.0.1 --backend-store-uri {redact(resolve_uri())}
Load the trunk:
  .venv/bin/python -c "import seer_scale; print(seer_scale.load('models:/seer-demo@latest'))"
""")


def main() -> None:
    """Data, training, evaluation, report."""
    from seer_scale import load
    from seer_scale.data import open_source, write_tiles
    from seer_scale.evaluation.features import measure_batch_norm
    from seer_scale.tracking import Tracker
    from seer_scale.tracking.records import METRICS, read_lines

    os.chdir(ROOT)
    print("tiles of real photographs:", DATA, flush=True)
    write_tiles(DATA)
    run_dir = fresh_folder(Path("runs/demo"))
    began = time.monotonic()
    pretrain(run_dir)
    seconds = time.monotonic() - began
    print("k nearest neighbours of the trunk before and after the training ...", flush=True)
    # From the registry, not from the run: what others will load is what is judged.
    send_rest(run_dir)
    accuracy = {"knn_top1": nearest_neighbours(load("models:/seer-demo@latest"))}
    random_trunk = starting_point(run_dir)
    accuracy["knn_top1_random"] = nearest_neighbours(random_trunk)
    # Running statistics of mean 0 and variance 1 make random weights look worse than they are.
    measure_batch_norm(random_trunk, open_source(DATA / "knn_train"), size=CROP)
    accuracy["knn_top1_random_measured"] = nearest_neighbours(random_trunk)
    tracker = Tracker(run_dir)
    tracker.log_metrics(accuracy, step=read_lines(run_dir / METRICS)[-1]["step"])
    tracker.finish()
    send_rest(run_dir)
    report(run_dir, accuracy, seconds)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        exit_with(error)
