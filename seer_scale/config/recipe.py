"""The command line and the recipe files: from `argv` to one validated `RunConfig`.

A recipe is a YAML file of sections; `section.key=value` on the command line wins over it. Nothing
here imports torch, and every mistake is a `ConfigError` before any process group exists.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from seer_scale.config import RunConfig, schema
from seer_scale.config.yaml_text import read_yaml, write_yaml
from seer_scale.errors import ConfigError

OPTIONS = ("--recipe", "--deepspeed_config", "--resume", "--help")
DERIVED = {"run.dir": "runs/<recipe>", "tracking.registered_name": "seer-<recipe>"}


@dataclass(frozen=True)
class Arguments:
    """What the command line asked for."""

    config: RunConfig
    resume: str | None


def parse(argv: Sequence[str], *, recipes: Path) -> Arguments:
    """Reads the command line, the recipe it names and its overrides.

    Args:
        argv: the arguments after the program's name; `--help` among them prints and exits.
        recipes: folder of the recipes that `--recipe NAME` finds.

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
    return Arguments(_resolve(path, overrides), options.resume)


def dump(config: RunConfig) -> str:
    """The resolved configuration as YAML, which `--recipe that.yaml` reads back as an equal one."""
    return write_yaml(config.model_dump(mode="json"))


def _resolve(path: Path, overrides: dict[str, Any]) -> RunConfig:
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
            _check_known(dotted, where=where)
            values[section][key] = value
            sources[dotted] = where
    objective = overrides.get("objective.name")
    if objective is not None and objective != values["objective"].get("name", "swav"):
        # The recipe's other options are those of the objective that was replaced.
        values["objective"] = {}
    for dotted, value in overrides.items():
        section, key = dotted.split(".", 1)
        values[section][key] = value
        sources.pop(dotted, None)
    for dotted, default in DERIVED.items():
        section, key = dotted.split(".")
        if values[section].get(key) is None:
            values[section][key] = default.replace("<recipe>", name)
    return schema.validate(values, sources=sources, recipe=str(path))


def _overrides(arguments: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if argument.startswith("-"):
            bare = key.lstrip("-")
            if bare in schema.key_schemas():
                hint = f": write {bare}=VALUE without dashes"
            else:
                hint = schema.did_you_mean(key, OPTIONS) or ": see --help"
            raise ConfigError(f"{key} is not an option{hint}")
        if not equals:
            hint = schema.did_you_mean(key, schema.key_schemas())
            raise ConfigError(f"{argument!r} is not an override section.key=value{hint}")
        if f"--{key}" in OPTIONS:
            raise ConfigError(f"{key} is an option, not a key: write --{key} {text}")
        _check_known(key)
        if not text.strip():
            known = schema.key_schemas().get(key)
            takes = f": it takes {schema.allowed(known)}" if known else ""
            raise ConfigError(f"{key}= has no value{takes}")
        _join(values, key, _value(key, text.strip(), where=argument))
    return values


def _value(key: str, text: str, *, where: str) -> Any:
    quoted = text[0] == text[-1] and text[0] in "'\""
    if schema.takes_text(key) and not quoted and not (text == "null" and _nullable(key)):
        return text
    return read_yaml(text, where=where)


def _nullable(key: str) -> bool:
    return key in DERIVED or schema.allowed(schema.key_schemas()[key]).endswith(" or null")


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
    hint = schema.did_you_mean(Path(recipe).stem, [path.stem for path in recipes.glob("*.yaml")])
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


class _Once(argparse.Action):
    """An option that takes one non-empty value, and contradicts itself never."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest)
        if not values:
            parser.error(f"{option_string} has no value")
        if before not in (None, values):
            parser.error(f"{option_string} is given twice: {before} and {values}")
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    recipes: Path

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")

    def format_help(self) -> str:
        return "\n".join(
            [super().format_help(), *_recipe_lines(self.recipes), "", *_key_lines(), ""]
        )


def parser(recipes: Path) -> argparse.ArgumentParser:
    """Of the command line whose overrides `parse` reads; `recipes` as there."""
    parser = _Parser(
        usage="%(prog)s --recipe NAME [--deepspeed_config FILE] "
        "[--resume auto|PATH|mlflow:RUN_ID] [section.key=value ...]",
        description="Pretrain a RegNet without labels, under deepspeed, torchrun or python.",
        allow_abbrev=False,
    )
    parser.recipes = recipes
    parser.add_argument("--recipe", action=_Once, metavar="NAME", help="a recipe below, or a .yaml")
    parser.add_argument(
        "--deepspeed_config",
        action=_Once,
        metavar="FILE",
        help="train under DeepSpeed with this JSON, e.g. ds_configs/zero2.json",
    )
    parser.add_argument(
        "--resume",
        action=_Once,
        metavar="auto|PATH|mlflow:RUN_ID",
        help="continue from the newest checkpoint of run.dir, from this one, or from the newest of "
        "an MLflow run",
    )
    # Appended by the deepspeed launcher; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _recipe_lines(recipes: Path) -> list[str]:
    lines = ["recipes:"]
    for path in sorted(recipes.glob("*.yaml")):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        lines.append(f"  {path.stem:<28}{first.removeprefix('#').strip()}")
    return lines


def default_of(key: str) -> str:
    """What `section.key` is where nobody gives it, in words."""
    described = schema.key_schemas()[key]
    if key in DERIVED:
        return DERIVED[key]
    return schema.shown(described["default"]) if "default" in described else "from the recipe"


def _key_lines() -> list[str]:
    lines = ["keys (section.key=value):"]
    for key, described in schema.key_schemas().items():
        lines.append(f"  {key}")
        lines.append(f"      {described['description']}")
        lines.append(f"      {schema.allowed(described)}; default: {default_of(key)}")
    lines.append("  objective.*")
    lines.append("      the objective's own options, e.g. objective.epsilon=0.03")
    return lines
