"""Whole training jobs for tests: a tiny image folder, and `run_job` for a rank of the pool."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seer_scale.train.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "launch" / "recipes"


def write_images(folder: Path, count: int = 24) -> Path:
    """Small JPEGs in two classes; smooth, so that they survive compression."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for index in range(count):
        path = folder / f"class{index % 2}" / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((72, 60), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def arguments(data: Path | str, run_dir: Path | str, *more: str) -> list[str]:
    """`debug` on `data`, without tracking unless `more` says otherwise."""
    return [
        *("--recipe", "debug", f"data.path={data}", f"run.dir={run_dir}"),
        *("data.crop_sizes=[32]", "data.crop_counts=[2]", "data.crop_scales=[[0.3, 1.0]]"),
        *([] if any(m.startswith("tracking.") for m in more) else ["tracking.enabled=false"]),
        *more,
    ]


def run_job(argv: list[str]) -> int:
    """What launch/pretrain.py does, inside a process group that exists; returns the last step."""
    from seer_scale import distributed
    from seer_scale.train import build

    parts = parts_of(argv)
    build.train(**parts, warn=print)
    config = parts["config"]
    return int(
        lines(Path(config.run.dir))[-1]["step"] if distributed.is_main() else config.train.steps
    )


def open_trainer(argv: list[str], device: Any = None) -> Trainer:
    """The trainer of a job, to be closed by the caller; on this rank's device unless given."""
    from seer_scale.train import build

    return build.trainer_of(**parts_of(argv, device))


def parts_of(argv: list[str], device: Any = None) -> dict[str, Any]:
    """A trainer's arguments."""
    from seer_scale import checkpoint, distributed
    from seer_scale.config.ds_config import ds_config_of
    from seer_scale.config.recipe import parse
    from seer_scale.data import open_source
    from seer_scale.train.build_engine import check_run

    parsed = parse(argv, recipes=RECIPES, ranks=distributed.world_size())
    config = parsed.config
    ds_config = ds_config_of(config, distributed.world_size())
    candidates = checkpoint.choose(parsed.resume, Path(config.run.dir))
    device = device or distributed.init()

    check_run(
        config,
        ds_config,
        world_size=distributed.world_size(),
        local_world_size=distributed.local_world_size(),
        cuda=False,
    )
    return {
        "config": config,
        "ds_config": ds_config,
        "source": open_source(config.data.path),
        "resume": checkpoint.first_whole(candidates, print),
        "device": device,
    }


def lines(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The objects of one of the run's records."""
    return [json.loads(line) for line in (run_dir / name).read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    """The loss of every step."""
    return [line["loss"] for line in lines(run_dir)]
