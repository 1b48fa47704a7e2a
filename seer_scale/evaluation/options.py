"""From `key=value` on a command line to a task's checked options, and their list for `--help`.

Tasks need torch, which takes seconds to import. So the list is read off their source text, and only
the task that runs is imported.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from seer_scale.config.schema import allowed, shown
from seer_scale.config.yaml_text import read_yaml
from seer_scale.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


class OptionText(NamedTuple):
    """An option as its task's source text declares it."""

    name: str
    type: str
    default: str
    description: str


def describe_options(task: str) -> list[OptionText]:
    """The options of a task's module, which is not imported; empty if there is no such module."""
    for name in (f"{task}.py", f"{task}_options.py"):
        path = Path(__file__).parent / "tasks" / name
        body = ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []
        for node in body:
            if isinstance(node, ast.ClassDef) and node.name == "Options":
                return list(_fields(node))
    return []


def _fields(options: ast.ClassDef) -> Iterator[OptionText]:
    for node in options.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        default, description = node.value, ""
        if isinstance(node.value, ast.Call):
            named = {word.arg: word.value for word in node.value.keywords}
            default = node.value.args[0] if node.value.args else named.get("default")
            if "description" in named:
                description = str(ast.literal_eval(named["description"]))
        text = "required" if default is None else ast.unparse(default)
        yield OptionText(node.target.id, ast.unparse(node.annotation), text, description)


def parse_overrides(arguments: Sequence[str]) -> dict[str, str]:
    """Texts by key of `key=value` arguments.

    Raises:
        ConfigError: an argument of another form, or a key given twice.
    """
    texts: dict[str, str] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if argument.startswith("-"):
            raise ConfigError(f"{key} is not an option: see --help")
        if not equals or not key:
            raise ConfigError(f"{argument!r} is not key=value: see --help for the task's options")
        if not text.strip():
            raise ConfigError(f"{key}= has no value")
        if key in texts:
            raise ConfigError(f"{key} is given twice: {texts[key]} and {text}")
        texts[key] = text.strip()
    return texts


def build_options(
    task: str, options: type[Model], preset: Mapping[str, Any], overrides: Mapping[str, str]
) -> Model:
    """A task's options: its defaults, then the preset's, then what the command line says.

    A key of an option that is a mapping is written with a point, `finetune.epochs=3`.

    Raises:
        ConfigError: an unknown key, or a value that cannot be.
    """
    schemas = options.model_json_schema()
    properties: dict[str, dict[str, Any]] = schemas.get("properties", {})
    values = dict(preset)
    for key, text in overrides.items():
        outer, dot, inner = key.partition(".")
        if dot and inner and properties.get(outer, {}).get("type") == "object":
            inside = read_yaml(text, where=f"{key}={text}")
            values[outer] = {**values.get(outer, {}), inner: inside}
            continue
        if key not in properties:
            near = difflib.get_close_matches(key, properties, n=1)
            hint = f"did you mean {near[0]}? Its options" if near else "its options"
            raise ConfigError(
                f"{key} is no option of the task {task}; {hint} are {', '.join(properties)}"
            )
        values[key] = _value(properties[key], key, text)
    try:
        return options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0]) if first["loc"] else ""
        if key not in properties:
            raise ConfigError(f"task {task}: {first['msg']}") from None
        about = properties[key].get("description", "")
        if first["type"] == "value_error":
            reason = str(first["ctx"]["error"])
        else:
            reason = f"but must be {_takes(properties[key])}"
        raise ConfigError(
            f"{key} is {shown(values.get(key))}, {reason}{f' ({about})' if about else ''}"
        ) from None


def _value(schema: Mapping[str, Any], key: str, text: str) -> Any:
    """The text itself where the option takes any, else YAML's reading of it."""
    choices = schema.get("anyOf", [schema])
    takes_text = any(c.get("type") == "string" and "enum" not in c for c in choices)
    nullable = any(c.get("type") == "null" for c in choices)
    if takes_text and not (text == "null" and nullable):
        return text
    return read_yaml(text, where=f"{key}={text}")


def _takes(schema: dict[str, Any]) -> str:
    """What the option takes, in words."""
    try:
        return allowed(schema)
    except KeyError:  # a mapping, which the words have no noun for
        return "a mapping, as {key: value}"
