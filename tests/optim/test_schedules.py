"""Learning rates against SEER's published numbers, and against its trainer's composition rule."""

from __future__ import annotations

import math
from typing import Any

import pytest

from seer_scale.optim.schedules import learning_rate, prototypes_frozen, scaled_lr, warmup_start

RG_10B = {"total_steps": 126_008, "warmup_steps": 5_500, "start": 0.15, "peak": 9.3, "end": 0.0093}
RG_256GF = {"total_steps": 122_070, "warmup_steps": 8_000, "start": 0.15, "peak": 9.6}


def composite(
    step: Any, *, total_steps: Any, warmup_steps: Any, start: Any, peak: Any, end: Any
) -> Any:
    """Two schedulers on the progress `where`: the first rescaled to its part, the second fixed."""
    where = step / total_steps
    length = warmup_steps / total_steps
    if where + 1e-6 <= length:
        where /= length
        return end_of_linear(start, peak, where)
    return end + 0.5 * (peak - end) * (1 + math.cos(math.pi * where))


def end_of_linear(start: Any, end: Any, where: Any) -> Any:
    return end * where + start * (1 - where)


def test_linear_scaling_gives_the_published_peaks_and_starts() -> None:
    assert scaled_lr(0.3, 4096) == pytest.approx(4.8)
    assert scaled_lr(0.3, 7936) == pytest.approx(9.3)
    assert scaled_lr(0.3, 8192) == pytest.approx(9.6)
    assert scaled_lr(0.3, 16 * 8) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("run", "after_warmup"),
    [(RG_10B, 9.2564), ({**RG_256GF, "end": 0.0096}, 9.4987)],
    ids=["rg_10b", "regnety_256gf"],
)
def test_cosine_runs_on_global_progress(run: Any, after_warmup: Any) -> None:
    def rate(step: Any) -> Any:
        return learning_rate(step, **run, schedule="cosine")

    warmup = run["warmup_steps"]
    assert rate(0) == 0.15
    assert rate(warmup // 2) == pytest.approx((0.15 + run["peak"]) / 2)
    assert rate(warmup) == pytest.approx(after_warmup, abs=5e-5)
    assert rate(warmup - 1) > rate(warmup), "the warm-up ends above the cosine, as in SEER"
    assert rate(run["total_steps"]) == pytest.approx(run["peak"] / 1000)


def test_warmup_starts_from_the_batch_of_one_node() -> None:
    assert warmup_start(9.3, nodes=62, floor=0.0093) == pytest.approx(scaled_lr(0.3, 16 * 8))
    assert warmup_start(9.6, nodes=64, floor=0.0096) == pytest.approx(0.15)
    assert warmup_start(4.8, nodes=1, floor=0.0048) == 0.0048, "on one node a warm-up all the same"


def test_cosine_equals_the_composed_schedulers_at_every_step() -> None:
    run: dict[str, Any] = {
        "total_steps": 300,
        "warmup_steps": 17,
        "start": 0.15,
        "peak": 9.3,
        "end": 0.0093,
    }
    for step in range(301):
        assert learning_rate(step, **run, schedule="cosine") == pytest.approx(
            composite(step, **run), rel=1e-12
        )


def test_constant_stays_at_the_peak() -> None:
    run: dict[str, Any] = {
        "total_steps": 100,
        "warmup_steps": 10,
        "start": 1.0,
        "peak": 2.0,
        "end": 0.002,
    }
    rates = [learning_rate(step, **run, schedule="constant") for step in range(101)]
    assert rates[:10] == pytest.approx([1 + step / 10 for step in range(10)])
    assert set(rates[10:]) == {2.0}


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_without_warmup_the_first_rate_is_the_peak(schedule: Any) -> None:
    run: dict[str, Any] = {
        "total_steps": 100,
        "warmup_steps": 0,
        "start": 0.1,
        "peak": 2.0,
        "end": 0.002,
    }
    assert learning_rate(0, **run, schedule=schedule) == 2.0


def test_prototypes_are_frozen_for_exactly_the_first_steps() -> None:
    assert [step for step in range(10) if prototypes_frozen(step, 3)] == [0, 1, 2]
    assert not prototypes_frozen(0, 0)
