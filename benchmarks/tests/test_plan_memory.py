"""The planner's memory against the resident memory of real processes, cell by cell."""

from __future__ import annotations

import pytest

from benchmarks import plan_memory


@pytest.mark.long
@pytest.mark.parametrize(
    ("trunk", "images", "strategy", "precision"),
    [
        ("regnety_200mf", 8, "ddp", "fp32"),
        pytest.param(
            *("regnety_8gf", 2, "fsdp", "bf16"),
            marks=[pytest.mark.slow, pytest.mark.timeout(3000)],
        ),
        *[
            pytest.param(
                *size, strategy, "fp32", marks=[pytest.mark.slow, pytest.mark.timeout(3000)]
            )
            for size in plan_memory.SIZES
            for strategy in plan_memory.STRATEGIES
        ],
    ],
)
def test_the_peak_is_within_a_tenth_of_resident_memory(
    trunk: str, images: int, strategy: str, precision: str
) -> None:
    found = plan_memory.cells(trunk, images, strategy, precision)
    assert [cell.mode for cell in found] == ["none", "full"]
    for cell in found:
        assert cell.predicted == pytest.approx(cell.measured, rel=0.1), cell
