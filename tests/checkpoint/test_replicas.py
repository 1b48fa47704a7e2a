"""Under hsdp, ranks that hold the same slices share the writing of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from harness import parity
from harness.pool import Distributed
from seer_scale import distributed as ranks
from seer_scale.checkpoint.reader import CheckpointReader
from seer_scale.checkpoint.saving import save
from seer_scale.models import MultiCropModel
from seer_scale.optim.filling import fill

CPU = torch.device("cpu")


def written(root: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """Saves two copies of two shards; this rank's elements, and the tensors of all."""
    case = parity.CASES["hsdp(2x2)"]
    engine = parity.build_engine(case, parity.configuration(case), CPU)
    save(
        root,
        step=0,
        slices=engine.written_slices(),
        model=engine.model,
        local_state={},
        trunk="regnety_debug",
        manifest={"state": {"step": 0}, "config": {"recipe": "test"}},
        keep=1,
    )
    mine = sum(part.values.numel() for part in engine.written_slices())
    return mine, parity.whole_tensors(engine)


def test_every_rank_writes_about_a_quarter(distributed: Distributed, tmp_path: Path) -> None:
    found = distributed(written, 4, tmp_path)
    amounts, (_, tensors) = [amount for amount, _ in found], found[0]
    model: MultiCropModel = parity.build(CPU)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert sum(amounts) == total  # each element once
    assert max(amounts) < 0.45 * total
    assert ranks.world_size() == 1
    (folder,) = [entry for entry in tmp_path.iterdir() if entry.name.startswith("step_")]
    fill(model, CheckpointReader(folder).values(model))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, tensors[name].view(parameter.shape)), name
        assert parameter.isfinite().all()


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_without_copies_that_share_nothing_is_cut(distributed: Distributed, case: str) -> None:
    shares = distributed(names_written, 2, case)
    if case == "ddp":
        assert shares[1] == []
    assert set(shares[0]) | set(shares[1]) == {
        name for name, _ in parity.build(CPU).named_parameters()
    }


def names_written(case: str) -> list[str]:
    """Names of the tensors of which this rank writes something."""
    found = parity.CASES[case]
    engine = parity.build_engine(found, parity.configuration(found), CPU)
    return [part.name for part in engine.written_slices()]
