"""The GPU parity check: its variants, its report, and its answer on a machine without GPUs."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import check, compared, usable_ranks, variants
from benchmarks.gpu_rows import Row, Variant, report
from harness import parity


@pytest.mark.slow
def test_the_driver_trains_compares_skips_and_survives(capsys: pytest.CaptureFixture[str]) -> None:
    matrix = [
        Variant("ddp"),
        Variant("fsdp", "full"),
        Variant("fsdp", precision="bf16"),
        Variant("ddp", precision="apex-o1"),
        Variant("hsdp(2x2)"),
        Variant("fairscale"),
        Variant("ddp", precision="fp31"),  # no such precision: the ranks die of it
        Variant("fsdp"),
    ]
    rows = check([matrix], 2, device="cpu", steps=2)
    assert [row.variant for row in rows] == matrix
    ddp, full, low, apex, hybrid, fairscale, broken, after = rows
    for row in (ddp, full, after):
        assert row.status == "ok"
        assert 0 < max(row.differences.values()) < 1e-4
    assert low.status == "ok"
    assert 1e-4 < low.differences["loss"] < 2e-2  # bf16 was really used
    assert {row.status for row in (apex, hybrid, fairscale)} == {"skipped"}
    assert "airscale" in fairscale.why.replace("S", "s")  # not installed, or without a GPU
    assert "NVIDIA Apex needs a CUDA GPU" in apex.why
    assert hybrid.why == "needs 4 ranks and there are 2"
    assert broken.status == "failed"
    assert "train.precision" in broken.why  # of the rank's own traceback
    assert report(rows) == 1
    out = capsys.readouterr().out
    assert "4 as they should be, 3 skipped, 1 failed\nFAILED ddp, recompute none, fp31: " in out


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_one_rank_trains_what_needs_no_more() -> None:
    cases = ["ddp", "fsdp", "hsdp(2x2)", "zero1", "zero2", "zero3", "zero3+cpu-offload"]
    rows = check(variants(cases), 1, device="cpu", steps=6)
    assert report(rows) == 0
    skipped = {row.variant.case for row in rows if row.status == "skipped"}
    done = {row.variant.case for row in rows if row.status == "ok"}
    assert "hsdp(2x2)" in skipped
    assert done == set(cases) - {"hsdp(2x2)"}


@pytest.mark.parametrize("mistake", ["larc", "momentum"])
def test_a_wrong_training_fails_with_its_numbers(
    capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    plain, wrong = parity.plain_loop(7), parity.plain_loop(7, mistake=mistake)
    row = compared(Variant("fsdp", "full"), wrong, plain)
    assert row.status == "failed"
    assert f"parameters {row.differences['parameters']:.2e} > 1e-04" in row.why
    right = compared(Variant("fsdp"), plain, plain)
    assert report([right, row]) == 1
    (last,) = capsys.readouterr().out.splitlines()[-1:]
    assert last.startswith("FAILED fsdp, recompute full, fp32: ")
    assert "> 1e-04" in last


def test_a_training_that_never_stepped_fails() -> None:
    plain = parity.plain_loop(1)
    stuck = parity.Result(plain.losses, [float("inf")], plain.tensors)
    row = compared(Variant("ddp", precision="amp-o1"), stuck, plain)
    assert (row.status, row.why) == ("failed", "every step was skipped")


def test_nothing_checked_is_no_success() -> None:
    assert report([Row(Variant("zero1"), "skipped", "deepspeed is not installed")]) == 1


def test_the_matrix_is_whole() -> None:
    flat = [variant for group in variants(list(gpu_check.CASES)) for variant in group]
    assert {*parity.CASES, "fairscale", "zero0"} == gpu_check.CASES.keys()
    for case in gpu_check.CASES:
        for checkpointing in ("none", "full"):
            assert Variant(case, checkpointing) in flat
    assert len(set(flat)) == len(flat)
    assert "nvme" in flat[-1].case  # the slow ones last


@pytest.mark.parametrize(("gpus", "ranks"), [(1, 1), (2, 2), (3, 2), (4, 4), (7, 4), (8, 8)])
def test_ranks_divide_the_batch(gpus: int, ranks: int) -> None:
    assert usable_ranks(gpus) == ranks


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no CUDA GPU here, nothing was checked")


def test_nothing_starts_after_the_time_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    groups = [[Variant("ddp"), Variant("ddp", "full")], [Variant("skip fsdp, NaN loss")]]
    rows = check(groups, 2, device="cpu", steps=2, minutes=-1.0)
    assert [row.status for row in rows] == ["skipped"] * 3
    assert {row.why for row in rows} == {"no time left of -1 minutes"}
    assert report(rows) == 1  # nothing was checked
    assert "skipped skip fsdp, NaN loss: no time left" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("minutes", "status", "why"),
    [
        (0.02, "skipped", "no time left of 0.02 minutes"),
        (5.0, "failed", "no end after 2 s"),
    ],
)
def test_what_has_not_ended_when_the_time_is_up_is_skipped(
    monkeypatch: pytest.MonkeyPatch, minutes: float, status: str, why: str
) -> None:
    """And what has not ended in its own time has failed."""
    monkeypatch.setattr(gpu_check, "SECONDS", 2)
    began = time.monotonic()
    (row,) = check([[Variant("ddp")]], 1, device="cpu", steps=2, minutes=minutes)
    assert (row.status, row.why) == (status, why)
    assert time.monotonic() - began < 30


@pytest.mark.slow
def test_the_driver_runs_the_cases_beside_the_matrix() -> None:
    names = ["syncbn channels_last, all ranks", "skip fsdp, NaN loss", "timeouts fsdp"]
    rows = check([[Variant(name)] for name in names], 2, device="cpu", steps=2)
    assert [(row.variant.case, row.status, row.why) for row in rows] == [
        (name, "ok", "") for name in names
    ]
