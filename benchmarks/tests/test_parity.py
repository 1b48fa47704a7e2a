"""`make parity` on a machine that lacks what a case needs."""

from __future__ import annotations

import sys

import pytest

from benchmarks import parity, record

REASON = "DeepSpeed's asynchronous file access needs libaio"


@pytest.mark.long
def test_a_case_that_cannot_run_here_is_named_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept: dict[str, object] = {}
    monkeypatch.setattr(parity, "missing_for_nvme", lambda: REASON)
    monkeypatch.setattr(parity, "WORLD_SIZES", (2,))
    monkeypatch.setattr(record, "save", lambda *given: kept.update(given[2]))
    monkeypatch.setattr(sys, "argv", ["parity", "--no-docs", "--only", "zero3+nvme", "zero2"])
    assert parity.main() == 0
    assert f"zero3+nvme: not run, since {REASON}\n" in capsys.readouterr().out
    assert kept["not run"] == {"zero3+nvme": REASON}
    rows = kept["rows"]
    assert isinstance(rows, list)
    assert [row["case"] for row in rows] == ["zero2"] * 3
