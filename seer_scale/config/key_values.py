"""Options written as `key=value` on a command line, checked against any pydantic model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel

from seer_scale.config.schema import build, help_lines, keys_of, read_value, shown
from seer_scale.config.yaml_text import read_yaml
from seer_scale.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def split_key_values(arguments: Sequence[str]) -> dict[str, str]:
    """Splits `key=value` arguments into a mapping of key to text.

    Raises:
        ConfigError: an argument of another form, or a key that is given twice.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if argument.startswith("-"):
            raise ConfigError(f"{key} is not an option: see --help")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not key=value: see --help for the keys")
        if not text.strip():
            raise ConfigError(f"{key}= has no value")
        if key in texts:
            raise ConfigError(f"{key} is given twice: {texts[key]} and {text}")
        texts[key] = text.strip()
    return texts


def build_from_texts(
    model: type[Model], preset: Mapping[str, Any], texts: Mapping[str, str], *, where: str
) -> Model:
    """Builds a model from its defaults, then a preset, then texts; the later wins.

    A key inside a key that takes a free mapping is written with a dot: `finetune.epochs=3`.

    Args:
        model: a pydantic model that refuses unknown keys.
        preset: values by key.
        texts: texts by key, from `split_key_values`.
        where: how the sentence about a mistake begins, such as `task knn: `.

    Raises:
        ConfigError: an unknown key, or a value that is not allowed.
    """
    known = keys_of(model)
    values = dict(preset)
    for key, text in texts.items():
        outer, _, inner = key.partition(".")
        if inner and known.get(outer, {}).get("type") == "object":
            inside = read_yaml(text, where=f"{key}={text}")
            values[outer] = {**values.get(outer, {}), inner: inside}
        else:
            # `build` reports a key that does not exist.
            values[key] = (
                read_value(known[key], text, where=f"{key}={text}") if key in known else text
            )
    return build(model, values, where=where)


def describe_keys(model: type[BaseModel]) -> list[str]:
    """Returns the lines of `--help` about every key of a model."""
    lines: list[str] = []
    for key, schema in keys_of(model).items():
        lines += help_lines(
            key, schema, shown(schema["default"]) if "default" in schema else "required"
        )
    return lines
