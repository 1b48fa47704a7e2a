"""Losses that jump: the threshold, and runs that go on or skip the update."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import median

import pytest

from harness.jobs import arguments, lines, losses
from harness.pool import Distributed
from seer_scale.train.spikes import WINDOW, spike_threshold
from tests.train.runs import EVERY, disturbed, same, state


def test_a_spike_is_far_above_the_usual() -> None:
    usual = [5 + 0.1 * math.sin(7 * step) for step in range(WINDOW)]
    middle = median(usual)
    mad = median(abs(loss - middle) for loss in usual)
    assert spike_threshold(usual, 10) == middle + 10 * mad
    assert spike_threshold(usual[1:], 10) == math.inf
    assert spike_threshold([1e9, *usual], 10) == spike_threshold(usual, 10)  # older ones are gone
    outliers = [*usual[:-3], 1e9, 1e9, 1e9]
    assert spike_threshold(outliers, 10) == pytest.approx(spike_threshold(usual, 10), rel=0.02)
    flat = [math.log(3000)] * WINDOW  # a plateau has no spread of its own
    assert spike_threshold(flat, 10) == pytest.approx(1.05 * math.log(3000))


@pytest.mark.long
@pytest.mark.parametrize("answer", ["continue", "skip"])
def test_a_spike_is_said_and_left_out_only_if_asked(
    distributed: Distributed, images: Path, tmp_path: Path, answer: str
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, *EVERY, "train.steps=7", f"train.on_spike={answer}")
    assert distributed(disturbed, 2, argv, 30.0, (6,), (0,), 4) == ["", ""]  # 15 times the mean
    assert same(state(run_dir, 5), state(run_dir, 6)) == (answer == "skip")
    skipped = [line.get("update_skipped") for line in lines(run_dir)]
    assert skipped == [None] * 5 + [float(answer == "skip"), None]
    assert not same(state(run_dir, 6), state(run_dir, 7))


def test_without_a_spike_skip_changes_nothing(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    for answer in ("continue", "skip"):
        argv = arguments(
            images,
            tmp_path / answer,
            *("train.steps=6", "train.gradient_accumulation=2", "optim.base_lr=0.05"),
            f"train.on_spike={answer}",
        )
        # From the fifth step on there is a threshold, which twice the loss would exceed.
        assert distributed(disturbed, 2, argv, 1.0, (), (), 4) == ["", ""]
    assert not any("update_skipped" in line for line in lines(tmp_path / "skip"))
    assert losses(tmp_path / "skip") == losses(tmp_path / "continue")
    assert same(state(tmp_path / "skip", 6), state(tmp_path / "continue", 6))
