"""A study: a grid of sizes, seeds, image budgets and objectives; every point is an ordinary run.

A point is a recipe with a few keys set. Only the folders of a study record what is finished, so a
study that is started again continues where it stopped.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

from seer_scale.config.field_types import Count, PathText
from seer_scale.config.recipe import parse
from seer_scale.config.schema import build
from seer_scale.config.yaml_text import read_yaml
from seer_scale.errors import ConfigError
from seer_scale.models.regnet import trunk_config

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
Texts = Annotated[tuple[Text, ...], Strict(False), Field(min_length=1)]
Counts = Annotated[tuple[Count, ...], Strict(False), Field(min_length=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Strict(False), Field(min_length=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Evaluation(_Section):
    """The evaluation of every finished point.

    Attributes:
        data: labelled images, as `seer-scale evaluate --data` takes them.
        tasks: options by name of the task.
    """

    data: PathText
    tasks: dict[str, dict[str, Any]] = Field({"knn": {}}, min_length=1)


class Study(_Section):
    """The content of a study file.

    Attributes:
        name: name of the study, of its MLflow experiment and of its parent run.
        recipe: recipe that all points start from.
        sizes: names of trunks, at least two.
        seeds: values of `run.seed`.
        images: budgets: images seen in training.
        objectives: names of objectives.
        global_batch: images per step of all points; give this or `steps`.
        steps: steps of every point; the batch is then the budget divided by the steps.
        processes: ranks of a run.
        deepspeed_config: path of the runs' DeepSpeed config; without one, torchrun starts the runs.
        set: further keys of all points, `section.key: value`.
        evaluate: evaluation of finished points.
        retries: number of times that a failed point is started again.
        hardware: hardware profile that `seer-scale plan` computes the costs for.
    """

    name: Text
    recipe: PathText
    sizes: Texts
    seeds: Seeds = (0,)
    images: Counts
    objectives: Texts = ("swav",)
    global_batch: Positive | None = None
    steps: Positive | None = None
    processes: Positive = 1
    deepspeed_config: PathText | None = None
    set: dict[str, Any] = Field(default_factory=dict)
    evaluate: Evaluation | None = None
    retries: Annotated[int, Field(ge=0)] = 1
    hardware: PathText = "cpu"

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
                unit = self.global_batch or self.steps or 1
                near = " or ".join(str(unit * n) for n in (whole, whole + 1) if n)
                raise ValueError(
                    f"images has {budget}, which is not a multiple of {divisor} {unit}: take {near}"
                )
        return self


@dataclass(frozen=True)
class Point:
    """One run of a study.

    Attributes:
        name: name of the point and of its run folder.
        trunk: name of the trunk.
        seed: value of `run.seed`.
        images: images seen in training.
        objective: name of the objective.
        recipe: recipe that the point starts from.
        overrides: `section.key=value` texts on top of the recipe.
        folder: run folder.
        steps: optimizer steps of the run.
        is_tracked: whether the run is sent to MLflow.
        tracking_uri: value of `tracking.uri`.
    """

    name: str
    trunk: str
    seed: int
    images: int
    objective: str
    recipe: str
    overrides: tuple[str, ...]
    folder: Path
    steps: int
    is_tracked: bool
    tracking_uri: str | None

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments of `seer-scale pretrain` that start the run."""
        return ("--recipe", self.recipe, *self.overrides)


def read_study(path: Path) -> Study:
    """Reads a study file.

    Raises:
        ConfigError: if the file is missing or not YAML, or a key or value is wrong.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--study {path} cannot be read ({error})") from None
    document = read_yaml(text, where=f"--study {path}: ")
    if not isinstance(document, dict):
        raise ConfigError(f"--study {path} holds no keys: docs/scaling.md shows a study")
    return build(Study, {str(key): value for key, value in document.items()}, where=f"{path}: ")


def points_of(study: Study, root: Path, recipes: Path) -> list[Point]:
    """Lists the points of a study; within a budget, trunks come in the order of `sizes`.

    Args:
        study: the study.
        root: folder of the study; the run folder of a point is `root/runs/<name>`.
        recipes: folder of the recipes.

    Raises:
        ConfigError: if the recipe is unknown, or a point cannot be started as a run.
    """
    for trunk in study.sizes:
        trunk_config(trunk)
    # Budgets are outermost: after the first budget there is a first curve over sizes.
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
            f"{accumulation} micro-batches: change processes or global_batch"
        )
    values = {
        "checkpoint.every": images // batch,
        "checkpoint.keep": 1,
        "tracking.experiment": study.name,
        "tracking.registered_name": f"{study.name}-{trunk}",
        **study.set,
        "model.trunk": trunk,
        "objective.name": objective,
        "train.images": images,
        "train.steps": images // batch,
        "train.global_batch": batch,
        "train.micro_batch_size": micro,
        "run.seed": seed,
        "run.dir": str(root / "runs" / name),
    }
    path = study.deepspeed_config
    overrides = (
        *([f"sharding.deepspeed_config={path}"] if path else []),
        # An override takes text as it is; JSON of all other values is YAML.
        *(
            f"{key}={value if isinstance(value, str) else json.dumps(value)}"
            for key, value in values.items()
        ),
    )
    try:
        argv = ("--recipe", study.recipe, *overrides)
        config = parse(argv, recipes=recipes, ranks=study.processes).config
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from None
    return Point(
        name,
        trunk,
        seed,
        images,
        objective,
        study.recipe,
        overrides,
        Path(config.run.dir),
        config.train.steps,
        config.tracking.enabled,
        config.tracking.uri,
    )
