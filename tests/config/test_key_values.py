"""`key=value` on a command line: presets, mappings, and one sentence for every mistake."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, Field

from seer_scale.config.key_values import build_from_texts, split_key_values
from seer_scale.config.schema import build
from seer_scale.errors import ConfigError
from seer_scale.evaluation.options import KnnOptions, LowshotOptions
from seer_scale.evaluation.presets import PRESETS


def test_the_command_line_wins_over_the_preset() -> None:
    preset = PRESETS["knn"].options
    chosen = build_from_texts(
        KnnOptions, preset, {"k": "7", "temperature": "[0.1, 1e-2]"}, where=""
    )
    assert (chosen.k, chosen.temperature, chosen.size) == ([7], [0.1, 0.01], 224)
    inner = build_from_texts(
        LowshotOptions,
        {"finetune": {"epochs": 70, "batch": 256}},
        {"finetune.epochs": "3", "train_list": "123", "fractions": "[]"},
        where="",
    )
    assert inner.finetune == {"epochs": 3, "batch": 256}
    assert (inner.train_list, inner.fractions) == ("123", [])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"kk": "1"}, r"task knn: kk is not a key: did you mean k\? The keys are k, temp"),
        ({"zzz": "1"}, "task knn: zzz is not a key: the keys are k, temperature, size"),
        ({"size": "big"}, r'size is "big", but must be an integer > 0 \(side of the centre crop'),
        ({"size": "0"}, "size is 0, but must be an integer > 0"),
        ({"k": "[0]"}, r"k is \[0\], but every value must be above 0"),
        ({"k": "[]"}, r"k is \[\], but must be a list of integers"),
        ({"k": "[1"}, "not valid YAML"),
    ],
)
def test_a_wrong_option_is_one_sentence(overrides: dict[str, str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build_from_texts(KnnOptions, {}, overrides, where="task knn: ")
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
        split_key_values(arguments)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    rate: float = Field(gt=0, description="GB/s")


class _Whole(BaseModel):
    model_config = ConfigDict(extra="forbid")
    part: _Part | None = None
    counts: dict[str, int] = {}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"part": {"rate": 0}}, r"x: part\.rate is 0, but must be a number > 0 \(GB/s\)"),
        ({"part": {}}, r"x: part\.rate is missing: it must be a number > 0"),
        ({"part": {"rat": 1}}, r"x: part\.rat"),
        ({"part": {"rate": 1, "rat": 1}}, r"x: part\.rat is not a key: did you mean rate\?"),
        ({"counts": {"a": "b"}}, r'x: counts is \{"a": "b"\}, but must be a mapping'),
        ({1: 2}, "x: 1 is not a key: the keys are part, counts"),
        (["a"], r'x: \["a"\] is not a mapping of key to value: the keys are part, counts'),
    ],
)
def test_a_mistake_inside_a_part_is_one_sentence(values: Any, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        build(_Whole, values, where="x: ")
    assert "\n" not in str(caught.value)
