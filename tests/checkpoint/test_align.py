"""A checkpoint knows nothing of aligned channels: written with them, read without, and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness.jobs import ROOT, arguments, losses, run_job, write_images
from harness.pool import Distributed
from seer_scale.checkpoint import CheckpointReader, list_checkpoints
from seer_scale.convert.loading import load
from seer_scale.models import build_trunk

ALIGNED = "model.align_channels=3"  # groups of 8 become 9, the stem's 32 become 33
ZERO = {
    stage: ["--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json")]
    for stage in (1, 2, 3)
}
FSDP = ["sharding.strategy=fsdp"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([ALIGNED, *FSDP], []),
        ([*ZERO[3]], [ALIGNED, *ZERO[2]]),
        pytest.param([ALIGNED, *ZERO[3]], [ALIGNED, *FSDP], marks=pytest.mark.slow),
        pytest.param([ALIGNED, *ZERO[1]], ["model.align_channels=5"], marks=pytest.mark.slow),
    ],
    ids=["fsdp to ddp without", "zero3 without to zero2", "zero3 to fsdp", "zero1 to another"],
)
def test_a_run_goes_on_with_other_padding(
    distributed: Distributed, images: Path, tmp_path: Path, before: list[str], after: list[str]
) -> None:
    whole, moved = tmp_path / "whole", tmp_path / "moved"
    common = ["checkpoint.every=4", "optim.base_lr=0.05", "checkpoint.keep=9"]
    common.append("train.micro_batch_size=4")
    distributed(run_job, 2, arguments(images, whole, *common, *before))
    source = whole / "checkpoints" / "step_00000004"
    argv = arguments(images, moved, *common, *after, "--resume", str(source))
    distributed(run_job, 2, argv)
    assert losses(moved) == pytest.approx(losses(whole)[4:], rel=1e-4)
    # As exact where it went on as where it stopped: momentum was taken over too.
    ends = [CheckpointReader(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, moved)]
    for name in ends[0].names:
        expected, actual = ends[0].whole(name), ends[1].whole(name)
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.long
@pytest.mark.parametrize("more", [ZERO[1], pytest.param(FSDP, marks=pytest.mark.slow)])
def test_resuming_with_the_same_padding_is_bit_for_bit(
    distributed: Distributed, images: Path, tmp_path: Path, more: list[str]
) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    common = ["checkpoint.every=4", "checkpoint.keep=9", ALIGNED, *more]
    distributed(run_job, 2, arguments(images, whole, *common))
    source = whole / "checkpoints" / "step_00000004"
    distributed(run_job, 2, arguments(images, resumed, *common, "--resume", str(source)))
    assert losses(resumed) == losses(whole)[4:]
    # What is saved is whole and of the plain model, and so is the trunk beside it.
    reader, again = (
        CheckpointReader(list_checkpoints(run / "checkpoints")[-1]) for run in (whole, resumed)
    )
    plain = build_trunk("regnety_debug", device="meta").state_dict()
    for name, tensor in plain.items():
        assert reader.shapes[f"trunk.{name}"] == tuple(tensor.shape)
    for name in reader.names:
        for kind in ("weight", "momentum") if reader.has_momentum(name) else ("weight",):
            assert torch.equal(again.whole(name, kind), reader.whole(name, kind)), name
    trunk = load(whole)
    for name, value in trunk.state_dict().items():
        assert torch.equal(value, reader.whole(f"trunk.{name}")), name
    assert trunk(torch.zeros(1, 3, 32, 32)).shape == (1, 152)
