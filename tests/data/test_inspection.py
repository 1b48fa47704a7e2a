"""The images that stand for a collection are spread over all of it."""

from __future__ import annotations

import pytest

from seer_scale.data.contact_sheet import INK, draw_cell
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


def test_names_with_accents_are_drawn_as_letters() -> None:
    """A font draws one and the same box for every letter that it lacks."""
    drawn = {draw_cell(None, [(letter, INK)], 20).tobytes() for letter in "üéøšЖλ"}
    assert len(drawn) == 6
