"""Options from the command line, their list without torch, and presets."""

from __future__ import annotations

from typing import Any

import pytest

from seer_scale.commands.evaluate import TASKS, load_task
from seer_scale.errors import ConfigError
from seer_scale.evaluation.options import build_options, describe_options, parse_overrides
from seer_scale.evaluation.presets import PRESETS
from seer_scale.evaluation.tasks import finetune, knn, lowshot


@pytest.mark.parametrize("task", TASKS)
def test_the_list_is_that_of_the_class(task: str) -> None:
    fields = load_task(task).options.model_fields
    described = describe_options(task)
    assert [option.name for option in described] == list(fields)
    for option in described:
        assert option.description == fields[option.name].description
        assert option.default


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_for_its_task(name: str) -> None:
    preset = PRESETS[name]
    chosen = build_options(preset.task, load_task(preset.task).options, preset.options, {})
    assert chosen.model_dump(include=set(preset.options)).keys() == preset.options.keys()
    if inner := preset.options.get("finetune"):
        finetune.Options(**inner)


def test_the_command_line_wins_over_the_preset() -> None:
    preset = PRESETS["knn"].options
    chosen = build_options("knn", knn.Options, preset, {"k": "7", "temperature": "[0.1, 1e-2]"})
    assert (chosen.k, chosen.temperature, chosen.size) == ([7], [0.1, 0.01], 224)
    inner = build_options(
        "lowshot",
        lowshot.Options,
        {"finetune": {"epochs": 70, "batch": 256}},
        {"finetune.epochs": "3", "train_list": "123", "fractions": "[]"},
    )
    assert inner.finetune == {"epochs": 3, "batch": 256}
    assert (inner.train_list, inner.fractions) == ("123", [])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"kk": "1"}, r"kk is no option of the task knn; did you mean k\? Its options are k, temp"),
        ({"zzz": "1"}, "zzz is no option of the task knn; its options are k, temperature, size"),
        ({"size": "big"}, r'size is "big", but must be an integer > 0 \(side of the centre crop'),
        ({"size": "0"}, "size is 0, but must be an integer > 0"),
        ({"k": "[0]"}, r"k is \[0\], every value has to be above 0"),
        ({"k": "[]"}, r"k is \[\], but must be a list of integers"),
        ({"k": "[1"}, "not valid YAML"),
    ],
)
def test_a_wrong_option_is_one_sentence(overrides: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build_options("knn", knn.Options, {}, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--k=3"], "--k is not an option"),
        (["3"], "'3' is not key=value"),
        (["k="], "k= has no value"),
        (["k=3", "k=4"], "k is given twice: 3 and 4"),
    ],
)
def test_arguments_of_another_form_are_named(arguments: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_overrides(arguments)


def test_presets_hold_the_published_numbers() -> None:
    linear: dict[str, Any] = {
        name: (PRESETS[name].options["epochs"], PRESETS[name].options["lr_steps"])
        for name in ("imagenet_linear", "places205_linear", "inat18_linear")
    }
    assert linear == {
        "imagenet_linear": (28, [8, 16, 24]),
        "places205_linear": (14, [4, 8, 12]),
        "inat18_linear": (84, [24, 48, 72]),
    }
    for name in linear:
        options = PRESETS[name].options
        assert (options["base_lr"], options["batch"]) == ([0.01], 256)
        assert options["weight_decay"] == 5e-4
    for name, fraction in (("imagenet_1pct", 0.01), ("imagenet_10pct", 0.1)):
        options = PRESETS[name].options
        inner = options["finetune"]
        assert options["fractions"] == [fraction]
        assert (inner["epochs"], inner["base_lr"], inner["lr_steps"]) == (70, 0.05, [30])
    base, paper = (PRESETS[f"imagenet_finetune{size}"].options for size in ("", "_384"))
    assert (base["epochs"], base["base_lr"], base["weight_decay"]) == (105, 0.1, 0)
    assert (paper["epochs"], paper["base_lr"], paper["weight_decay"]) == (35, 0.0125, 1e-4)
    assert (paper["batch"], paper["size"], paper["test_resize"]) == (256, 384, 384)
    assert PRESETS["inat18_finetune"].options["lr_steps"] == [7, 14, 21]
    svm = PRESETS["voc07_svm"].options
    assert svm["costs"] == [0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000]
    assert (svm["folds"], svm["max_iter"]) == (3, 2000)
    coco = PRESETS["coco_maskrcnn"].options
    assert (coco["iterations"], coco["lr_steps"]) == (90_000, [60_000, 80_000])
    assert (coco["lr"], coco["warmup"], coco["batch"]) == (0.02, 100, 16)
