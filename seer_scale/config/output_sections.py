"""Sections `checkpoint`, `eval`, `profile` and `tracking` of a configuration."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from seer_scale.config.field_types import (
    CropSide,
    NonNegative,
    PathText,
    Positive,
    PositiveFloat,
    Ranks,
    Section,
    StepRange,
    Text,
)
from seer_scale.config.mlflow_names import LONGEST_EXPERIMENT, name_problem, plain_name


class CheckpointSection(Section):
    every: Positive = Field(
        1000, description="steps between checkpoints; the last step is always saved"
    )
    keep: Positive = Field(2, description="number of newest checkpoints to keep")
    keep_every: Positive | None = Field(
        None, description="keep checkpoints at multiples of this many steps for good"
    )


class EvalSection(Section):
    every: Positive | None = Field(
        None,
        description=(
            "steps between k-NN evaluations; each saves a checkpoint first, and the last "
            "step is evaluated too; null means never"
        ),
    )
    data: PathText | None = Field(
        None, description="labelled images: a folder that holds train and val, or TRAIN,VAL"
    )
    size: CropSide = Field(224, description="side of the centre crop in pixels")
    k: Positive = Field(20, description="number of neighbours that vote")
    temperature: PositiveFloat = Field(
        0.07, description="temperature of the votes: weight exp(cosine / temperature)"
    )
    images: Positive = Field(
        20_000, description="largest number of images used, of train and of val each"
    )
    batch: Positive = Field(64, description="images per rank and forward pass")
    prototypes: NonNegative = Field(
        8,
        description="prototypes whose nearest images are drawn on a sheet; 0 draws no sheet",
    )

    @model_validator(mode="after")
    def _has_images(self) -> Self:
        if self.every is not None and self.data is None:
            raise ValueError(
                f"eval.every is {self.every}, but eval.data is not given: name a folder of "
                "labelled images with train and val below it, or set eval.every=null"
            )
        return self


class ProfileSection(Section):
    steps: StepRange | None = Field(
        None, description="first and last step to profile, e.g. [20, 22]; null profiles nothing"
    )
    ranks: Ranks = Field((0,), description="ranks that write a trace and a table")

    @model_validator(mode="after")
    def _steps_ascend(self) -> Self:
        if self.steps is not None and self.steps[0] > self.steps[1]:
            raise ValueError(
                f"profile.steps is {list(self.steps)}, but the first step is after the last: give "
                f"{sorted(self.steps)}"
            )
        return self


class TrackingSection(Section):
    enabled: bool = Field(True, description="send the run to MLflow")
    uri: PathText | None = Field(
        None,
        description="MLflow server; null means MLFLOW_TRACKING_URI if set, else sqlite:///mlflow.db",
    )
    experiment: Text = Field("seer-scale", description="MLflow experiment")
    registered_name: Text | None = Field(
        None, description="name of the registered model in MLflow, without / and :"
    )
    log_models: bool = Field(
        True,
        description=(
            "log trunks as MLflow models: of every checkpoint; above 1 GiB of those at eval.every, "
            "at checkpoint.keep_every and of the last"
        ),
    )
    checkpoints: Literal["none", "reference", "copy"] = Field(
        "reference",
        description=(
            "what MLflow keeps of a checkpoint for --resume mlflow:RUN_ID: nothing (none), "
            "its path (reference) or all files (copy)"
        ),
    )
    system_metrics: bool = Field(
        True, description="log CPU, memory and GPU figures of rank 0's node"
    )

    @model_validator(mode="after")
    def _mlflow_takes_the_names(self) -> Self:
        if not self.enabled:
            return self
        if self.log_models and self.registered_name is not None:
            problem = name_problem(self.registered_name)
            if problem:
                raise ValueError(
                    f"tracking.registered_name is {self.registered_name!r}, but MLflow takes "
                    f"{problem}: set tracking.registered_name={plain_name(self.registered_name)}, "
                    "or tracking.log_models=false"
                )
        if len(self.experiment) > LONGEST_EXPERIMENT:
            raise ValueError(
                f"tracking.experiment has {len(self.experiment)} characters, but MLflow takes at "
                f"most {LONGEST_EXPERIMENT}: give a shorter name"
            )
        return self
