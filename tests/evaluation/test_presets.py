"""Presets: each is valid for its task, and holds the published numbers."""

from __future__ import annotations

from typing import Any

import pytest

from seer_scale.commands.evaluate import main
from seer_scale.config.key_values import build_from_texts
from seer_scale.evaluation import session
from seer_scale.evaluation.options import OPTIONS
from seer_scale.evaluation.presets import PRESETS
from seer_scale.evaluation.tasks import finetune


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_for_its_task(name: str) -> None:
    preset = PRESETS[name]
    chosen = build_from_texts(OPTIONS[preset.task], preset.options, {}, where="")
    assert chosen.model_dump(include=set(preset.options)).keys() == preset.options.keys()
    if inner := preset.options.get("finetune"):
        finetune.Options(**inner)


def test_a_preset_given_is_a_preset_used(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[session.Request] = []
    monkeypatch.setattr(session, "evaluate", asked.append)
    argv = ["--model", "random:regnety_debug", "--data", "images", "--preset"]
    main(["linear", *argv, "places205_linear", "batch=32"])
    main(["transfer", *argv, "inat18_finetune"])
    linear, transfer = (request.options.model_dump() for request in asked)
    assert (linear["epochs"], linear["lr_steps"], linear["batch"]) == (14, [4, 8, 12], 32)
    assert transfer["method"] == "finetune"
    assert (transfer["options"]["epochs"], transfer["options"]["lr_steps"]) == (24, [7, 14, 21])


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
