"""The parser of `seer-scale pretrain`: its options, and `--help` with every recipe and key."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn

from seer_scale.config import schema
from seer_scale.config.home_folder import expand_home
from seer_scale.errors import ConfigError

OPTIONS = ("--recipe", "--deepspeed_config", "--resume", "--dry-run", "--help")
# Keys that follow from the recipe's name.
DERIVED = {"run.dir": "runs/<recipe>", "tracking.registered_name": "seer-<recipe>"}


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
    """Builds the argument parser; `parse` reads the overrides that it leaves over."""
    parser = _Parser(
        usage="%(prog)s --recipe NAME [--deepspeed_config FILE] "
        "[--resume auto|PATH|mlflow:RUN_ID] [--dry-run] [section.key=value ...]",
        description="Pretrain a RegNet without labels, under deepspeed, torchrun or python.",
        allow_abbrev=False,
    )
    parser.recipes = recipes
    parser.add_argument(
        "--recipe",
        type=expand_home,
        action=_Once,
        metavar="NAME",
        help="a recipe below, or a .yaml",
    )
    parser.add_argument(
        "--deepspeed_config",
        type=expand_home,
        action=_Once,
        metavar="FILE",
        help="train under DeepSpeed with this JSON, e.g. ds_configs/zero2.json",
    )
    parser.add_argument(
        "--resume",
        type=expand_home,
        action=_Once,
        metavar="auto|PATH|mlflow:RUN_ID",
        help="continue from the newest checkpoint of run.dir, from this one, or from the newest of "
        "an MLflow run",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the whole configuration that these ranks would train, and end",
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
    """Says in words what `section.key` is if it is not given."""
    described = schema.key_schemas()[key]
    if key in DERIVED:
        return DERIVED[key]
    if "default" not in described or (described["default"] is None and "anyOf" not in described):
        return "from the recipe"
    return schema.shown(described["default"])


def _key_lines() -> list[str]:
    lines = ["keys (section.key=value):"]
    for key, described in schema.key_schemas().items():
        lines += schema.help_lines(key, described, default_of(key))
    lines.append("  objective.*")
    lines.append("      the objective's own options, e.g. objective.epsilon=0.03")
    return lines
