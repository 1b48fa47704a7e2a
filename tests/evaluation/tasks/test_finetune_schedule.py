"""Learning rates of the published schedules, and the order of an epoch."""

from __future__ import annotations

import pytest

from seer_scale.evaluation.tasks import finetune
from seer_scale.evaluation.tasks.finetune_schedule import epoch_order, learning_rate


def test_the_published_schedules() -> None:
    base = finetune.Options()
    at = {epoch: learning_rate(base, 10 * epoch, 10) for epoch in (0, 29, 30, 60, 90, 100, 104)}
    assert list(at.values()) == pytest.approx([0.1, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-5])
    paper = finetune.Options(epochs=35, base_lr=0.0125, schedule="cosine", weight_decay=1e-4)
    assert learning_rate(paper, 0, 10) == 0.0125
    assert learning_rate(paper, 175, 10) == pytest.approx(0.0125 / 2)
    warm = finetune.Options(batch=512, warmup_epochs=2)
    assert [learning_rate(warm, step, 2) for step in range(5)] == pytest.approx(
        [0.05, 0.1, 0.15, 0.2, 0.2]
    )


def test_an_epoch_is_a_permutation_of_its_own() -> None:
    orders = [epoch_order(50, seed=1, epoch=epoch).tolist() for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
