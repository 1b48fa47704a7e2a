"""Study files are read strictly; their points resolve to runs that launch/pretrain.py takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from seer_scale.config.recipe import parse
from seer_scale.errors import ConfigError
from seer_scale.studies.study import Point, Study, points_of, read_study

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "launch" / "recipes"
GOOD: dict[str, Any] = {
    "name": "tiny",
    "recipe": "debug",
    "sizes": ["regnety_debug", "regnety_200mf"],
    "seeds": [0, 1],
    "images": [32, 64],
    "global_batch": 8,
    "processes": 2,
    "set": {"data.path": "images", "optim.lr": 1e-3},
}


def written(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def points(folder: Path, **changes: Any) -> tuple[Study, list[Point]]:
    study = read_study(written(folder, GOOD | changes))
    return study, points_of(study, folder / "out", RECIPES)


def test_points_are_the_whole_grid_and_resolve_to_runs(tmp_path: Path) -> None:
    _, found = points(tmp_path)
    assert len({point.name for point in found}) == 2 * 2 * 2
    for point in found:
        config = parse(point.arguments, recipes=RECIPES, ranks=1).config
        assert config.train.steps == point.steps
        assert (config.tracking.enabled, config.tracking.uri) == (True, None)
        assert (point.is_tracked, point.tracking_uri) == (True, None)
        assert config.model.trunk == point.trunk
        assert config.run.seed == point.seed
        assert config.train.steps * config.train.micro_batch_size * 2 == point.images
        assert config.optim.lr == 1e-3
        assert Path(config.run.dir) == point.folder == tmp_path / "out" / "runs" / point.name
        assert config.tracking.experiment == "tiny"


def test_set_changes_other_keys_but_not_those_of_the_grid(tmp_path: Path) -> None:
    for point in points(tmp_path)[1]:
        checkpoint = parse(point.arguments, recipes=RECIPES, ranks=1).config.checkpoint
        assert (checkpoint.every, checkpoint.keep) == (point.steps, 1)  # one, at the end
    grid = {"model.trunk": "rg_10b", "run.seed": 9, "train.steps": 1, "objective.name": "simclr"}
    for point in points(tmp_path, set={"checkpoint.every": 3, **grid})[1]:
        config = parse(point.arguments, recipes=RECIPES, ranks=1).config
        assert config.checkpoint.every == 3
        assert (config.model.trunk, config.run.seed) == (point.trunk, point.seed)
        assert config.train.steps == point.images // 8
        assert config.objective.name == point.objective == "swav"


def test_with_steps_given_the_batch_follows_the_budget(tmp_path: Path) -> None:
    _, found = points(tmp_path, global_batch=None, steps=4)
    configs = [parse(point.arguments, recipes=RECIPES, ranks=1).config for point in found]
    assert {config.train.steps for config in configs} == {4}
    assert {config.train.micro_batch_size for config in configs} == {4, 8}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sizes": ["regnety_debug"]}, "sizes has one entry, regnety_debug"),
        ({"sizes": ["regnety_debug", "regnety_debug"]}, "sizes has one entry"),
        ({"seeds": [1, 1]}, "seeds .* names an entry twice"),
        ({"recipe": "debgu"}, "debgu"),
        ({"sizes": ["regnety_debug", "regnety_5gf"]}, "regnety_5gf"),
        ({"images": [30]}, "30, which is not a multiple of global_batch 8: take 24 or 32"),
        ({"images": [5]}, "5, which is not a multiple of global_batch 8: take 8"),
        ({"steps": 4}, "give one of global_batch and steps"),
        ({"global_batch": None}, "give one of global_batch and steps"),
        ({"processes": 3}, "8 images a step do not divide into 3 processes"),
        ({"sedes": [1]}, r"sedes is not a key: did you mean seeds\? The keys are name, recipe"),
        ({"set": {"optim.lrr": 1}}, "optim.lrr"),
        ({"images": []}, "images"),
        ({"images": "many"}, "images"),
    ],
)
def test_what_is_wrong_is_one_sentence(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        points(tmp_path, **changes)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_study(tmp_path / "none.yaml")
    for text in ("", "- a", "a: [", "name: x\nname: y"):
        path = tmp_path / "study.yaml"
        path.write_text(text)
        with pytest.raises(ConfigError):
            read_study(path)
