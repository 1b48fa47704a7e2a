"""The formula on small numbers; benchmarks/tests/test_memory.py holds it against engines."""

from __future__ import annotations

import pytest

from seer_scale.parallel.state_bytes import StateBytes, state_bytes

SIZES = [100, 300, 600]  # 4000 bytes


@pytest.mark.parametrize(
    ("strategy", "more", "expected"),
    [
        ("ddp", {}, (4000, 4000, 4000)),
        ("fsdp", {}, (1000, 1000, 1000)),
        ("zero", {"stage": 0}, (4000, 4000, 4000)),
        ("zero", {"stage": 1}, (4000, 1000, 2000)),  # its gradients are reduced
        ("zero", {"stage": 2}, (4000, 1000, 2000)),
        ("zero", {"stage": 3}, (1000, 1000, 2000)),
        ("zero", {"stage": 3, "persistent": 300}, (1000 + 1600, 1000, 2000)),
    ],
)
def test_four_shards(strategy: str, more: dict[str, int], expected: tuple[int, int, int]) -> None:
    found = state_bytes(SIZES, strategy, 4, **more)
    assert found == StateBytes(*expected)
    assert found.total == sum(expected)


def test_one_rank_of_stage_3_holds_small_tensors_once() -> None:
    found = state_bytes(SIZES, "zero", 1, stage=3, persistent=300)
    assert found == StateBytes(4000, 4000, 8000)


def test_an_unknown_strategy_has_no_formula() -> None:
    with pytest.raises(ValueError, match="'zero' with stage 4"):
        state_bytes(SIZES, "zero", 2, stage=4)
