"""The snapshot of a GPU's memory when it runs out; torch has a snapshot without a GPU too."""

from __future__ import annotations

import pickle
from pathlib import Path

from seer_scale.performance.memory_snapshot import MemorySnapshot


def test_a_failed_allocation_leaves_a_snapshot_and_its_place(tmp_path: Path) -> None:
    path = tmp_path / "out_of_memory" / "rank_3.pickle"
    snapshot = MemorySnapshot(path)
    assert snapshot.sentence() == ""
    snapshot.take(0, 1 << 31, 1 << 36, 1 << 20)  # as torch calls its observers
    assert snapshot.sentence() == f"; what the GPU's memory held is in {path}"
    assert "segments" in pickle.loads(path.read_bytes())


def test_a_snapshot_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "out_of_memory").touch()
    path = tmp_path / "out_of_memory" / "rank_0.pickle"
    snapshot = MemorySnapshot(path)
    snapshot.take(0, 1, 2, 3)
    assert snapshot.sentence().startswith("; what the GPU's memory held is not written to ")
    assert f"{path} (" in snapshot.sentence()
