"""A trunk of SEER's size, RegNetY-16GF, takes real steps under ZeRO 2 and 3 on two ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from harness.jobs import ROOT, lines, write_images
from seer_scale.distributed.ports import free_port
from tests.launch.test_pretrain import PRETRAIN, launch

pytestmark = [pytest.mark.launch, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.mark.parametrize("stage", [2, 3])
def test_regnety_16gf_takes_two_steps(tmp_path: Path, stage: int) -> None:
    images = write_images(tmp_path / "images", 8)
    command = [
        *(str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2"),
        *("--master_port", str(free_port()), PRETRAIN),
        *("--recipe", "swav_in1k_regnety_16gf", f"data.path={images}"),
        *("--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json")),
        *(f"run.dir={tmp_path / 'run'}", "train.steps=2", "train.micro_batch_size=2"),
        *("train.precision=fp32", "optim.warmup_steps=0", "data.workers=0"),
        "sharding.sync_bn_group_size=0",  # the recipe has groups of 8
        *("data.crop_sizes=[64, 32]", "data.crop_counts=[2, 2]", "tracking.enabled=false"),
    ]
    done = launch(command, tmp_path, seconds=800)
    assert done.returncode == 0, done.stderr
    first, second = lines(tmp_path / "run")
    assert 0 < second["loss"] < 2 * first["loss"]
    assert second["grad_norm"] > 0
