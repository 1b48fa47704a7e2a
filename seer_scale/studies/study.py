"""A study: sizes x seeds x image budgets x objectives, as points that are ordinary runs.

A point is a recipe with a handful of keys set; its run folder tells whether it is finished. So a
study that is started again goes on where it was, and nothing but the folders remembers anything.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, ValidationError, model_validator

from seer_scale.config import RunConfig
from seer_scale.config.recipe import parse
from seer_scale.config.yaml_text import read_yaml
from seer_scale.errors import ConfigError
from seer_scale.models.regnet import trunk_config

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Texts = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)]
Counts = Annotated[tuple[Positive, ...], Strict(False), Field(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Evaluation(_Section):
    """What every finished point is judged by.

    Attributes:
        data: labelled set, as `seer-scale evaluate --data` takes it.
        tasks: names of tasks, each with its options.
    """

    data: Text
    tasks: dict[str, dict[str, Any]] = Field({"knn": {}}, min_length=1)


class Study(_Section):
    """What a study file says.

    Attributes:
        name: of the study, its MLflow experiment and its parent run.
        recipe: that all points start from.
        sizes: trunks, at least two.
        seeds: of initial values, order and augmentation.
        images: budgets, images seen in training.
        objectives: names.
        global_batch: images a step, for all points; or
        steps: of every point, whose batch is then its budget divided by them.
        processes: ranks of a run.
        deepspeed_config: of the runs; without one they are started by torchrun.
        set: further keys of all points, `section.key: value`.
        evaluate: what finished points are judged by.
        retries: how often a failed point is started again.
        hardware: profile that costs are planned for; see `seer-scale plan`.
    """

    name: Text
    recipe: Text
    sizes: Texts
    seeds: Seeds = (0,)
    images: Counts
    objectives: Texts = ("swav",)
    global_batch: Positive | None = None
    steps: Positive | None = None
    processes: Positive = 1
    deepspeed_config: Text | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    evaluate: Evaluation | None = None
    retries: Annotated[int, Field(ge=0)] = 1
    hardware: Text = "cpu"

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        if len(set(self.sizes)) < 2:
            raise ValueError(
                f"sizes has one entry, {self.sizes[0]}: a study over model size needs two or more"
            )
        for name in ("sizes", "seeds", "images", "objectives"):
            entries = getattr(self, name)
            if len(set(entries)) < len(entries):
                raise ValueError(f"{name} {list(entries)} names an entry twice: leave one")
        if (self.global_batch is None) == (self.steps is None):
            raise ValueError("give one of global_batch and steps: the other follows from images")
        for budget in self.images:
            whole, rest = divmod(budget, self.global_batch or self.steps or 1)
            if rest or not whole:
                divisor = "global_batch" if self.global_batch else "steps"
                raise ValueError(
                    f"images has {budget}, which is no multiple of {divisor} "
                    f"{self.global_batch or self.steps}"
                )
        return self


@dataclass(frozen=True)
class Point:
    """One run of a study.

    Attributes:
        name: of the point and its run folder.
        trunk, seed, images, objective: what sets it apart.
        arguments: of `seer-scale pretrain`.
        config: as that resolves them.
    """

    name: str
    trunk: str
    seed: int
    images: int
    objective: str
    arguments: tuple[str, ...]
    config: RunConfig


def read_study(path: Path) -> Study:
    """Reads a study file.

    Raises:
        ConfigError: if it is missing or no YAML, or a key or value cannot be.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--study {path} cannot be read ({error})") from None
    document = read_yaml(text, where=f"--study {path}: ")
    if not isinstance(document, dict):
        raise ConfigError(f"--study {path} holds no keys: docs/scaling.md shows a study")
    try:
        return Study(**{str(key): value for key, value in document.items()})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            text = f"is no key of a study; there are {', '.join(Study.model_fields)}"
        raise ConfigError(f"{path}: {key + ': ' if key else ''}{text}") from None


def points_of(study: Study, root: Path, recipes: Path) -> list[Point]:
    """The points of a study, small trunks' first as `sizes` has them.

    Args:
        study: from `read_study`.
        root: the study's folder; every point's run lies in `root/runs/<name>`.
        recipes: folder of the recipes.

    Raises:
        ConfigError: if the recipe is unknown, or a point is no run that could be started.
    """
    for trunk in study.sizes:
        trunk_config(trunk)
    # Budgets outermost: with the first budget done there is a first curve over sizes.
    grid = itertools.product(study.images, study.seeds, study.objectives, study.sizes)
    return [_point(study, root, recipes, *entry) for entry in grid]


def _point(
    study: Study, root: Path, recipes: Path, images: int, seed: int, objective: str, trunk: str
) -> Point:
    name = f"{trunk}-{objective}-{images}-seed{seed}"
    batch = study.global_batch or images // (study.steps or 1)
    accumulation = int(study.set.get("train.gradient_accumulation", 1))
    micro, rest = divmod(batch, study.processes * accumulation)
    if rest or not micro:
        raise ConfigError(
            f"{name}: {batch} images a step do not divide into {study.processes} processes times "
            f"{accumulation} micro-batches: change processes or the batch"
        )
    values = {
        "checkpoint.every": images // batch,
        "checkpoint.keep": 1,
        "tracking.experiment": study.name,
        "tracking.registered_name": f"{study.name}-{trunk}",
        **study.set,
        "model.trunk": trunk,
        "objective.name": objective,
        "train.steps": images // batch,
        "train.micro_batch_size": micro,
        "run.seed": seed,
        "run.dir": str(root / "runs" / name),
    }
    given = ["--deepspeed_config", study.deepspeed_config] if study.deepspeed_config else []
    arguments = (
        *("--recipe", study.recipe),
        *given,
        # Texts are taken as they are; of all else JSON is YAML.
        *(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in values.items()
        ),
    )
    try:
        config = parse(arguments, recipes=recipes).config
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return Point(name, trunk, seed, images, objective, arguments, config)
