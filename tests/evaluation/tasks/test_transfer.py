"""Transfer runs the task of its method with that task's options, and beats a floor."""

from __future__ import annotations

from pathlib import Path

import pytest

from seer_scale.errors import UserError
from seer_scale.evaluation.tasks import finetune, transfer
from tests.evaluation.patterns import context, write_patterns

FLOOR = 0.6  # of top-1 with four classes
QUICK = {
    "batch": 16,
    "size": 32,
    "test_size": 48,
    "test_resize": 48,
    "workers": 1,
    "epochs": 10,
    "base_lr": 0.4,
    "schedule": "cosine",
    "warmup_epochs": 1,
}


def test_everything_fine_tuned_beats_the_floor(tmp_path: Path) -> None:
    data = write_patterns(tmp_path / "data")
    options = transfer.Options(method="finetune", options=QUICK)
    result = transfer.run(context(tmp_path / "a", data), options)
    assert result.metrics["top1"] >= FLOOR
    assert result.details["options"] == finetune.Options(**QUICK).model_dump(mode="json")


def test_the_published_schedules_are_options() -> None:
    inaturalist = {"epochs": 24, "lr_steps": [7, 14, 21]}
    options = transfer.Options(method="finetune", options=inaturalist)
    assert finetune.Options(**options.options).lr_steps == (7, 14, 21)


def test_another_task_s_option_is_named(tmp_path: Path) -> None:
    options = transfer.Options(method="finetune", options={"k": 20})
    with pytest.raises(
        UserError, match=r"method=finetune: options\.k is not a key: the keys are epochs, batch"
    ):
        transfer.run(context(tmp_path, tmp_path), options)
