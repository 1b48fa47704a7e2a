"""Options of the tasks: every one is in `--help`, and each task's module offers its own."""

from __future__ import annotations

from importlib import import_module

import pytest

from seer_scale.commands.evaluate import TASKS
from seer_scale.config.key_values import describe_keys
from seer_scale.evaluation.options import OPTIONS


def test_every_task_has_options() -> None:
    assert OPTIONS.keys() == TASKS.keys()
    for task, options in OPTIONS.items():
        assert import_module(f"seer_scale.evaluation.tasks.{task}").Options is options


@pytest.mark.parametrize("task", TASKS)
def test_the_help_lists_every_option_with_its_description_and_default(task: str) -> None:
    lines = describe_keys(OPTIONS[task])
    fields = OPTIONS[task].model_fields
    assert [line.strip() for line in lines[::3]] == list(fields)
    for described, takes, field in zip(lines[1::3], lines[2::3], fields.values(), strict=True):
        assert described.strip() == field.description
        _, separator, default = takes.partition("; default: ")
        assert separator
        assert default
