"""The command line and the recipe files: from `argv` to one validated `RunConfig`.

A recipe is a YAML file of sections; `section.key=value` on the command line wins over it, and what
both leave open follows from the number of ranks. Nothing here imports torch, and every mistake is a
`ConfigError` before any process group exists.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seer_scale.config import RunConfig, schema
from seer_scale.config.command_line import DERIVED, OPTIONS, parser
from seer_scale.config.completion import (
    BATCHES,
    check_pairs,
    complete,
    drop_replaced,
    numbers_of_older_run,
)
from seer_scale.config.yaml_text import read_yaml, write_yaml
from seer_scale.errors import ConfigError, did_you_mean

# Keys of older config.yaml files -> the one value that they may still have, which is dropped.
GONE = {"optim.nesterov": False}


@dataclass(frozen=True)
class Arguments:
    """Result of reading the command line.

    Attributes:
        config: configuration of the run, with every number that follows from the ranks.
        resume: what `--resume` says, if it is given.
        dry_run: whether the run shall only be described.
        notes: what the number of ranks cannot keep of the recipe, one line each.
    """

    config: RunConfig
    resume: str | None
    dry_run: bool
    notes: tuple[str, ...]


def parse(
    argv: Sequence[str],
    *,
    recipes: Path,
    ranks: int,
    saved: Mapping[str, Any] | None = None,
) -> Arguments:
    """Reads the command line, the recipe it names and its overrides.

    Args:
        argv: the arguments after the program's name; `--help` among them prints and exits.
        recipes: folder of the recipes that `--recipe NAME` finds.
        ranks: processes of the run.
        saved: configuration in the checkpoint from which the run resumes; numbers of a run that was
            started before recipes left them open stand in place of the recipe's.

    Raises:
        ConfigError: an unknown option, recipe or key, or a value that cannot be.
    """
    options, rest = parser(recipes).parse_known_args(argv)
    overrides = _overrides(rest)
    if options.deepspeed_config is not None:
        _join(overrides, "sharding.deepspeed_config", options.deepspeed_config)
    if overrides.get("sharding.deepspeed_config") is not None:
        overrides.setdefault("sharding.strategy", "zero")
    if options.recipe is None:
        raise ConfigError(f"no recipe is named: add --recipe NAME, one of {_names(recipes)}")
    path = _find(options.recipe, recipes)
    config, notes = _resolve(path, overrides, ranks, numbers_of_older_run(saved or {}))
    return Arguments(config, options.resume, options.dry_run, notes)


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `--recipe that.yaml` reads back as an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def _resolve(
    path: Path, overrides: dict[str, Any], ranks: int, older: dict[str, dict[str, Any]]
) -> tuple[RunConfig, tuple[str, ...]]:
    where = f"{path}: "
    document = _read(path)
    name = document.pop("recipe", path.stem)
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{where}recipe is {schema.shown(name)}, but must be a non-empty string")
    values: dict[str, Any] = {"recipe": name, **{section: {} for section in schema.sections()}}
    sources = {}
    for section, content in document.items():
        if section not in schema.sections():
            raise schema.unknown_key(str(section), where=where)
        if not isinstance(content, dict | None):
            raise ConfigError(
                f"{where}{section} is {schema.shown(content)}, but must be a section of keys"
            )
        for key, value in (content or {}).items():
            dotted = f"{section}.{key}"
            if not isinstance(key, str):
                raise schema.unknown_key(dotted, where=where)
            if _is_gone(dotted, value, where=where):
                continue
            _check_known(dotted, where=where)
            values[section][key] = value
            sources[dotted] = where
    if older:
        values["train"] = {k: v for k, v in values["train"].items() if k not in BATCHES}
    for section, numbers in older.items():
        drop_replaced(values, [f"{section}.{key}" for key in numbers])
        values[section] |= numbers
    objective = overrides.get("objective.name")
    if objective is not None and objective != values["objective"].get("name", "swav"):
        # The recipe's other options are those of the objective that was replaced.
        values["objective"] = {}
    drop_replaced(values, overrides)
    for dotted, value in overrides.items():
        section, key = dotted.split(".", 1)
        values[section][key] = value
        sources.pop(dotted, None)
    check_pairs(values, sources)
    for dotted, default in DERIVED.items():
        section, key = dotted.split(".")
        if values[section].get(key) is None:
            values[section][key] = default.replace("<recipe>", name)
    config = schema.validate(values, sources=sources, recipe=str(path))
    follow, notes = complete(config, overrides, ranks, where=str(path))
    for section, numbers in follow.items():
        values[section] |= numbers
    return schema.validate(values, sources=sources, recipe=str(path)), notes


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if argument.startswith("-"):
            bare = key.lstrip("-")
            if bare in schema.key_schemas():
                hint = f": write {bare}=VALUE without dashes"
            else:
                hint = did_you_mean(key, OPTIONS) or ": see --help"
            raise ConfigError(f"{key} is not an option{hint}")
        if not equals:
            hint = did_you_mean(key, schema.key_schemas())
            raise ConfigError(f"{argument!r} is not an override section.key=value{hint}")
        if f"--{key}" in OPTIONS:
            raise ConfigError(f"{key} is an option, not a key: write --{key} {text}")
        if key in GONE and _is_gone(key, read_yaml(text, where=argument)):
            continue
        _check_known(key)
        if not text.strip():
            known = schema.key_schemas().get(key)
            takes = f": it takes {schema.allowed(known)}" if known else ""
            raise ConfigError(f"{key}= has no value{takes}")
        _join(values, key, _value(key, text.strip(), where=argument))
    return values


def _value(key: str, text: str, *, where: str) -> Any:
    described = schema.key_schemas().get(key, {})
    return schema.read_value(described, text, where=where, nullable=key in DERIVED)


def _is_gone(dotted: str, value: Any, *, where: str = "") -> bool:
    if dotted not in GONE:
        return False
    if value is not GONE[dotted]:
        raise ConfigError(
            f"{where}{dotted} is {schema.shown(value)}, but the key is gone and only "
            f"{schema.shown(GONE[dotted])} is still accepted: leave it out"
        )
    return True


def _check_known(dotted: str, *, where: str = "") -> None:
    section, _, key = dotted.partition(".")
    # What an objective takes is known to that objective alone.
    free = section == "objective" and key.isidentifier()
    if dotted not in schema.key_schemas() and not free:
        raise schema.unknown_key(dotted, where=where)


def _join(values: dict[str, Any], key: str, value: Any) -> None:
    if key in values and repr(values[key]) != repr(value):
        raise ConfigError(
            f"{key} is given twice: {schema.shown(values[key])} and {schema.shown(value)}"
        )
    values[key] = value


def _names(recipes: Path) -> str:
    return ", ".join(sorted(path.stem for path in recipes.glob("*.yaml")))


def _find(recipe: str, recipes: Path) -> Path:
    named = recipes / f"{recipe}.yaml"
    is_path = Path(recipe).suffix in (".yaml", ".yml")
    if is_path and Path(recipe).exists():
        return Path(recipe)
    if not is_path and named.is_file():
        return named
    kind = "recipe file" if is_path else "recipe"
    hint = did_you_mean(Path(recipe).stem, [path.stem for path in recipes.glob("*.yaml")])
    raise ConfigError(
        f"there is no {kind} {recipe!r}{hint or ':'} the recipes are {_names(recipes)}, or give "
        f"the path of a .yaml file"
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the recipe {path} is not UTF-8 text") from None
    document = read_yaml(text, where=str(path))
    if not isinstance(document, dict):
        raise ConfigError(
            f"the recipe {path} holds {schema.shown(document)}, but must hold sections of keys"
        )
    return document
