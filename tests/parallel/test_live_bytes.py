"""Counting bytes of tensors against sums written out."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from seer_scale.parallel.live_bytes import LiveBytes


@pytest.mark.parametrize("fake", [False, True])
def test_storages_are_counted_once_and_until_they_are_freed(fake: bool) -> None:
    if fake:
        with FakeTensorMode():
            count_a_product()
    else:
        count_a_product()


def count_a_product() -> None:
    weight = torch.empty(10, 10, requires_grad=True)  # from before: not counted
    with LiveBytes() as live:
        x = torch.empty(5, 10)
        assert live.now == 200
        y = (x @ weight).relu_()
        assert live.now == 400
        view, whole = y.view(-1)[:7], weight.view(-1)
        assert live.now == 400
        del x, view, whole  # the product keeps x for the backward pass
        assert live.now == 400
        total = y.sum()
        del y
        assert live.now == 404
        total.backward()
        # The total and the weight's gradient; most of all before x and y were done with.
        assert live.now == 404
        assert live.peak() > 400 + 404
        assert live.peak(without=[weight.grad]) <= live.peak() - 200
    assert live.peak(without=[weight.grad]) >= 404


def test_the_peak_is_that_of_the_time_before_something_was_freed() -> None:
    with LiveBytes() as live:
        first = torch.empty(100)
        second = torch.empty(50)
        del first
        third = torch.empty(80)
    assert (live.now, live.peak()) == (4 * 130, 4 * 150)
    assert live.peak(without=[second]) == 4 * 100
    assert live.peak(without=[third]) == 4 * 150
