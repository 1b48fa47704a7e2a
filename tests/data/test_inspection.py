"""The images that stand for a collection are spread over all of it."""

from __future__ import annotations

import pytest

from seer_scale.data.inspection import spread


@pytest.mark.parametrize(
    ("total", "most", "expected"),
    [
        (10, 4, [0, 2, 5, 7]),
        (12, 3, [0, 4, 8]),
        (3, 5, [0, 1, 2]),
        (5, 5, [0, 1, 2, 3, 4]),
        (0, 2, []),
    ],
)
def test_chosen_images_are_spread_evenly(total: int, most: int, expected: list[int]) -> None:
    assert spread(total, most) == expected
