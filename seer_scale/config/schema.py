"""Keys of a pydantic model: their values in words, and one sentence for every mistake.

Everything is read from the model's JSON schema, so that `--help` and the sentence after a mistake
agree with what is checked. `RunConfig`, whose keys are `section.key`, has functions of its
own below.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from seer_scale.config import RunConfig
from seer_scale.config.yaml_text import read_yaml
from seer_scale.errors import ConfigError, suggestion

_NOT_UTF8 = "string_unicode"  # pydantic's word

Schema = dict[str, Any]
Model = TypeVar("Model", bound=BaseModel)

_BOUNDS = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}


@cache
def keys_of(model: type[BaseModel]) -> dict[str, Schema]:
    """Returns every key of a model with its JSON schema; one without `default` is required."""
    root = model.model_json_schema()
    definitions: dict[str, Schema] = root.get("$defs", {})

    def inline(part: Any) -> Any:
        if isinstance(part, list):
            return [inline(entry) for entry in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            part = {**definitions[part["$ref"].rsplit("/", 1)[1]], **part}
            del part["$ref"]
        return {name: inline(entry) for name, entry in part.items()}

    return dict(inline(root.get("properties", {})))


def build(model: type[Model], values: Any, *, where: str) -> Model:
    """Checks values against a model and returns an instance of the model.

    Args:
        model: a model that refuses unknown keys.
        values: a mapping of key to value.
        where: how the sentence about a mistake begins, such as `study.yaml: `.

    Raises:
        ConfigError: the first mistake, in one sentence with the key, its value and what is allowed.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{where}{shown(values)} is not a mapping of key to value: the keys are "
            f"{', '.join(keys_of(model))}"
        )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _mistake(error, model, values, where) from None


def _mistake(error: ValidationError, model: type[BaseModel], value: Any, where: str) -> ConfigError:
    """Returns the sentence for the first of pydantic's errors."""
    first = error.errors()[0]
    reason = str(first["ctx"]["error"]) if first["type"] == "value_error" else ""
    schema: Schema = {"properties": keys_of(model)}
    path: list[str] = []
    for part in map(str, first["loc"]):
        choices = schema.get("anyOf", [schema])
        known: dict[str, Schema] = next((c["properties"] for c in choices if "properties" in c), {})
        if not known:  # a place inside a list or a free mapping
            break
        path.append(part)
        if part not in known:
            hint = suggestion(part, known, f"the keys are {', '.join(known)}")
            return ConfigError(f"{where}{'.'.join(path)} is not a key: {hint}")
        schema, value = known[part], value.get(part) if isinstance(value, Mapping) else None
    key = ".".join(path)
    if not key:
        return ConfigError(f"{where}{reason or first['msg']}")
    if reason:
        about = f" ({schema['description']})" if "description" in schema else ""
        return ConfigError(f"{where}{key} is {shown(value)}, but {reason}{about}")
    if first["type"] == _NOT_UTF8:
        return _not_utf8(key, value, where)
    if first["type"] == "missing":
        return ConfigError(f"{where}{key} is missing: it must be {allowed(schema)}")
    return wrong_value(key, value, schema, where=where)


def _not_utf8(key: str, value: Any, where: str) -> ConfigError:
    """Returns the sentence about a path with bytes that are no UTF-8, which libraries refuse."""
    return ConfigError(
        f"{where}{key} is {value!a}, but must be UTF-8: rename the file or folder, or make a "
        "link to it that has another name"
    )


def allowed(schema: Schema, *, many: bool = False) -> str:
    """Says what a value may be: 'an integer > 0', 'cosine or constant', 'a list of integers > 0'.

    Args:
        schema: JSON schema of a key, from `keys_of`.
        many: use the plural.
    """
    if "anyOf" in schema:
        return " or ".join(allowed(choice, many=many) for choice in schema["anyOf"])
    if "allowed" in schema:
        return str(schema["allowed"])
    if "enum" in schema:
        *firsts, last = schema["enum"]
        return f"{', '.join(firsts)} or {last}"
    kind = schema["type"]
    if kind == "object":
        return "mappings" if many else "a mapping {key: value}"
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


def read_value(schema: Schema, text: str, *, where: str, nullable: bool = False) -> Any:
    """Reads the value of a key from the command line.

    A key that takes any string gets the text as it stands, so that `123` and `*.tar` need no
    quotes; every other text is read as YAML.

    Args:
        schema: JSON schema of the key, from `keys_of`.
        text: text after the equals sign, not empty.
        where: the whole argument, for the sentence about a mistake.
        nullable: whether `null` means "not set" even if the schema does not say so.

    Raises:
        ConfigError: the text is not valid YAML.
    """
    choices = schema.get("anyOf", [schema])
    takes_text = any(choice.get("type") == "string" and "enum" not in choice for choice in choices)
    nullable = nullable or any(choice.get("type") == "null" for choice in choices)
    quoted = text[0] == text[-1] and text[0] in "'\""
    if takes_text and not quoted and not (text == "null" and nullable):
        return text
    return read_yaml(text, where=where)


def help_lines(key: str, schema: Schema, default: str) -> list[str]:
    """Returns the lines of `--help` about a key: name, description, what is allowed, default."""
    lines = [f"  {key}"]
    if "description" in schema:
        lines.append(f"      {schema['description']}")
    return [*lines, f"      {allowed(schema)}; default: {default}"]


def wrong_value(key: str, value: Any, schema: Schema, *, where: str = "") -> ConfigError:
    """Returns the sentence for a value of the wrong type or out of range."""
    takes = allowed(schema)
    about = f" ({schema['description']})" if "description" in schema else ""
    hint = ""
    if isinstance(value, float) and not math.isfinite(value):
        takes = takes.replace("number", "finite number")
    elif "string" in takes and not isinstance(value, str | list | dict | None):
        hint = f'; quotes make it one: "{value}"'
    return ConfigError(f"{where}{key} is {shown(value)}, but must be {takes}{about}{hint}")


def shown(value: Any) -> str:
    """Returns a value as its author would write it, cut to 80 characters."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


# The keys of a run.


@cache
def key_schemas() -> dict[str, Schema]:
    """Returns every `section.key` of a run with its JSON schema."""
    return {
        f"{section}.{key}": schema
        for section, part in keys_of(RunConfig).items()
        for key, schema in part.get("properties", {}).items()
    }


@cache
def sections() -> tuple[str, ...]:
    """Returns the sections of a run, in order."""
    return tuple(dict.fromkeys(key.split(".")[0] for key in key_schemas()))


def unknown_key(key: str, *, where: str = "") -> ConfigError:
    """Returns the sentence for a key of a run that does not exist, with the nearest keys."""
    section, dot, leaf = key.partition(".")
    if not dot:
        section, leaf = "", key
    by_leaf: dict[str, list[str]] = {}
    for name in key_schemas():
        by_leaf.setdefault(name.split(".")[1], []).append(name)
    # The likeliest slip is the right name under the wrong section, or under no section.
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
    """Builds the frozen configuration of a run.

    Args:
        values: section -> key -> value; every key exists.
        sources: for each key that a file gave, the file's name and a colon.
        recipe: name of the file that should have given a missing key.

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
        given = values[section][name]
        if first["type"] == _NOT_UTF8:
            raise _not_utf8(key, given, sources.get(key, "")) from None
        raise wrong_value(key, given, schema, where=sources.get(key, "")) from None
