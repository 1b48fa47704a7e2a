"""What the keys of a run are called and what each takes, in words.

Read off the pydantic schema once, so that `--help` and the sentence after a mistake never differ
from what is checked.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from pydantic import ValidationError

from seer_scale.config import RunConfig
from seer_scale.errors import ConfigError

Schema = dict[str, Any]

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@cache
def key_schemas() -> dict[str, Schema]:
    """Every `section.key` with its JSON schema; a schema without `default` is required."""
    root = RunConfig.model_json_schema()
    return {
        f"{section}.{key}": schema
        for section, reference in root["properties"].items()
        if "$ref" in reference
        for key, schema in root["$defs"][reference["$ref"].rsplit("/", 1)[1]]["properties"].items()
    }


@cache
def sections() -> tuple[str, ...]:
    """The first parts of the keys, in order."""
    return tuple(dict.fromkeys(key.split(".")[0] for key in key_schemas()))


def allowed(schema: Schema, *, many: bool = False) -> str:
    """What a value may be: 'an integer > 0', 'cosine or constant', 'a list of integers > 0'."""
    if "anyOf" in schema:
        return " or ".join(allowed(choice, many=many) for choice in schema["anyOf"])
    if "allowed" in schema:
        return str(schema["allowed"])
    if "enum" in schema:
        *firsts, last = schema["enum"]
        return f"{', '.join(firsts)} or {last}"
    kind = schema["type"]
    if kind == "array":
        if "prefixItems" in schema:
            noun, items = ("pairs" if many else "a pair"), schema["prefixItems"][0]
        else:
            noun, items = ("lists" if many else "a list"), schema["items"]
        return f"{noun} of {allowed(items, many=True)}"
    if kind == "boolean":
        return "true or false"
    if kind == "null":
        return "null"
    if kind == "string":
        return "a non-empty string"
    noun = {"integer": ("an integer", "integers"), "number": ("a number", "numbers")}[kind][many]
    bounds = [f"{sign} {schema[name]}" for name, sign in _BOUNDS.items() if name in schema]
    return " ".join([noun, " and ".join(bounds)]).rstrip()


def takes_text(key: str) -> bool:
    """Whether the key takes any string, so that `123` and `*.tar` need no quotes."""
    schema = key_schemas().get(key, {})
    return any(
        choice.get("type") == "string" and "enum" not in choice
        for choice in schema.get("anyOf", [schema])
    )


def shown(value: Any) -> str:
    """A value as its author would write it, cut where it would drown the sentence."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """': did you mean a or b?', or '' when nothing known resembles `name`."""
    near = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f": did you mean {' or '.join(near)}?" if near else ""


def unknown_key(key: str, *, where: str = "") -> ConfigError:
    """The sentence for a key that does not exist, with the nearest ones that do."""
    section, dot, leaf = key.partition(".")
    if not dot:
        section, leaf = "", key
    by_leaf: dict[str, list[str]] = {}
    for name in key_schemas():
        by_leaf.setdefault(name.split(".")[1], []).append(name)
    # The right name under the wrong section, or under none, is the likeliest slip.
    near = by_leaf.get(leaf, [])
    near = near or difflib.get_close_matches(key, key_schemas() if dot else sections(), n=1)
    for close in difflib.get_close_matches(leaf, by_leaf, n=1):
        near = near or by_leaf[close]
    if key in sections() or (section in sections() and not near):
        names = [name for name in key_schemas() if name.startswith(f"{section or key}.")]
        return ConfigError(f"{where}{key} is not a key: {section or key} has {', '.join(names)}")
    if near:
        return ConfigError(f"{where}{key} is not a key: did you mean {' or '.join(near)}?")
    return ConfigError(
        f"{where}{key} is not a key: keys are section.key, and the sections are "
        f"{', '.join(sections())}"
    )


def validate(values: dict[str, Any], *, sources: Mapping[str, str], recipe: str) -> RunConfig:
    """The frozen configuration.

    Args:
        values: section -> key -> value, every key known.
        sources: for the keys that a file gave, the file's name.
        recipe: name of the file that should have given what is missing.

    Raises:
        ConfigError: the first mistake, in one sentence.
    """
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "value_error":
            raise ConfigError(str(first["ctx"]["error"])) from None
        key = ".".join(str(part) for part in first["loc"][:2])
        schema = key_schemas()[key]
        if first["type"] == "missing":
            raise ConfigError(
                f"{recipe} lacks {key}: {schema['description']} ({allowed(schema)})"
            ) from None
        section, name = key.split(".")
        raise wrong_value(key, values[section][name], where=sources.get(key, "")) from None


def wrong_value(key: str, value: Any, *, where: str = "") -> ConfigError:
    """The sentence for a value of the wrong type or out of range."""
    schema = key_schemas()[key]
    takes = allowed(schema)
    hint = ""
    if isinstance(value, float) and not math.isfinite(value):
        takes = takes.replace("number", "finite number")
    elif "string" in takes and not isinstance(value, str | list | dict | None):
        hint = f'; quotes make it one: "{value}"'
    return ConfigError(
        f"{where}{key} is {shown(value)}, but must be {takes} ({schema['description']}){hint}"
    )
