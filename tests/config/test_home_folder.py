"""`~` is the home folder in every path that a user gives, as a key, in a file or as an argument."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

from harness.jobs import RECIPES
from seer_scale.commands.run import COMMANDS
from seer_scale.config import recipe
from seer_scale.config.home_folder import expand_home, local_path
from seer_scale.config.key_values import build_from_texts
from seer_scale.config.schema import key_schemas
from seer_scale.config.yaml_text import read_yaml, write_yaml
from seer_scale.evaluation.options import OPTIONS
from seer_scale.studies.study import Evaluation, Study
from seer_scale.tracking.uri import resolve_uri

PATH_KEYS = (
    *("data.path", "data.cache_dir", "run.dir", "eval.data", "tracking.uri"),
    "sharding.deepspeed_config",
)
# Arguments whose values are no paths.
OTHERS = {
    *("--alias", "--name", "--trunk", "--to", "--strategy", "--preset", "--local_rank"),
    *("--images", "task", "shell", "verb", "--point", "--crops", "--seconds"),
    "--run",  # a recipe, which the parser of recipes expands
}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def test_only_a_tilde_at_the_beginning_is_home(home: Path) -> None:
    assert expand_home("~/a~b/~") == f"{home}/a~b/~"
    assert expand_home("~/train,~/val") == f"{home}/train,{home}/val"
    for text in ("a/~/b", "s3://bucket/~/x.tar", "photos~", "~nobody-of-this-name/x"):
        assert expand_home(text) == text
    assert local_path("~") == home
    assert resolve_uri("sqlite:///~/m.db") == f"sqlite:///{home}/m.db"


@pytest.mark.parametrize("key", PATH_KEYS)
@pytest.mark.parametrize("where", ["argument", "recipe"])
def test_keys_of_a_run(home: Path, key: str, where: str) -> None:
    section, name = key.split(".")
    argv = ["--recipe", "debug", "data.path=photos"]
    if where == "argument":
        argv = [*argv[:2], f"{key}=~/x"] if key == "data.path" else [*argv, f"{key}=~/x"]
    else:
        text = (RECIPES / "debug.yaml").read_text()
        (home / "mine.yaml").write_text(f"{text}\n")
        document = read_yaml(text, where="")
        document.setdefault(section, {})[name] = "~/x"
        if key == "sharding.deepspeed_config":
            document["sharding"]["strategy"] = "zero"
        (home / "mine.yaml").write_text(write_yaml(document))
        argv = ["--recipe", "~/mine.yaml", *([] if key == "data.path" else argv[2:])]
    config = recipe.parse(argv, recipes=RECIPES, ranks=1).config
    assert getattr(getattr(config, section), name) == f"{home}/x"


def test_every_key_about_a_file_or_folder_is_held_above() -> None:
    words = ("folder", "path", "file")
    found = {
        key
        for key, described in key_schemas().items()
        if "string" in str(described) and any(word in described["description"] for word in words)
    }
    assert found <= {*PATH_KEYS, "data.refresh", "tracking.checkpoints", "data.max_age_days"}


def test_options_of_tasks_and_studies(home: Path) -> None:
    for task, keys in {
        "lowshot": ("train_list",),
        "finetune": ("train_list", "labels", "deepspeed_config"),
    }.items():
        for key in keys:
            more = {"strategy": "zero"} if key == "deepspeed_config" else {}
            built = build_from_texts(OPTIONS[task], {}, {key: "~/x", **more}, where="")
            assert getattr(built, key) == f"{home}/x"
    study = Study(
        name="s",
        recipe="~/r.yaml",
        sizes=("a", "b"),
        images=(8,),
        steps=2,
        deepspeed_config="~/ds.json",
        hardware="~/h.yaml",
        evaluate=Evaluation(data="~/train,~/val"),
    )
    assert study.evaluate is not None
    found = (study.recipe, study.deepspeed_config, study.hardware, study.evaluate.data)
    assert found == (
        f"{home}/r.yaml",
        f"{home}/ds.json",
        f"{home}/h.yaml",
        f"{home}/train,{home}/val",
    )


def actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for inner in action.choices.values():
                yield from actions(inner)
        else:
            yield action


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_of_every_command(command: str) -> None:
    """An argument is a path, or is known to be none."""
    for action in actions(import_module(f"seer_scale.commands.{command}").parser()):
        name = action.option_strings[0] if action.option_strings else action.dest
        takes_text = action.nargs != 0 and action.choices is None and action.type in (None, Path)
        assert not takes_text or name in OTHERS, name
