"""The share of unusable images that ends a run."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from harness.calls import Calls
from harness.fake_ranks import fake_ranks
from seer_scale.data import BadSample
from seer_scale.errors import DataError
from seer_scale.train import bad_samples
from seer_scale.train.bad_samples import WINDOW, BadSamples
from seer_scale.train.trainer import Trainer


def test_too_many_bad_images_end_the_run() -> None:
    watch = BadSamples(0.1)
    watch.count([BadSample(f"{n}.jpg", "truncated") for n in range(30)])
    watch.count([BadSample(f"{n}.jpg", "zero bytes") for n in range(80)])
    for _ in range(9):
        watch.observe(100, 20)  # too large a share, but of fewer images than WINDOW
    with pytest.raises(DataError, match="200 of the last 1200 images cannot be used") as caught:
        watch.observe(WINDOW - 900, 20)
    assert "(since the start, zero bytes: 80 images; truncated: 30 images)" in str(caught.value)
    calm = BadSamples(0.1)
    for _ in range(100):
        calm.observe(100, 11)  # 11 of 111
    with pytest.raises(DataError):
        calm.observe(100, 200)


def test_one_image_that_is_met_in_every_epoch_is_one_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    watch = BadSamples(1.0)
    assert watch.report() == ""
    for _ in range(7):
        watch.count([BadSample("a.jpg", "truncated")])
    watch.count([BadSample("b.jpg", "zero bytes"), BadSample("c.jpg", "zero bytes")])
    assert watch.report() == "truncated: 1 image, met 7 times; zero bytes: 2 images"
    monkeypatch.setattr(bad_samples, "MOST_NAMES", 3)  # no more names are kept than this
    watch.count([BadSample("d.jpg", "zero bytes")])
    assert watch.report() == "truncated: met 7 times; zero bytes: met 3 times"


@pytest.mark.parametrize(("bad", "collectives"), [(0, 0), (1, 2)])
def test_a_bad_image_costs_two_collectives_at_512_ranks(bad: int, collectives: int) -> None:
    """`_record_samples` of a step in which one rank replaced an image, or none did."""
    trainer: Any = SimpleNamespace(
        settings=SimpleNamespace(log_samples=False, global_batch=512),
        telemetry=SimpleNamespace(bad_samples=lambda step, everyone: None),
        bad_samples=BadSamples(0.5),
        state=SimpleNamespace(step=3),
    )
    mine = [BadSample("a.jpg", "truncated")] * bad
    step: Any = [SimpleNamespace(batch=SimpleNamespace(bad=mine))]
    with fake_ranks(512, 5), Calls() as calls:
        Trainer._record_samples(trainer, step, bad)
    assert calls.collectives.total() == collectives
