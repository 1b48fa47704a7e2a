"""The typed, frozen, strict configuration of a run: each number has one owner.

Sections hold plain data. What a recipe leaves open (how the ranks share a step, the steps of a
schedule) `config/completion.py` fills in, once, where the ranks are known. Numbers that follow from
these, such as learning rates, are computed elsewhere and never written back. Nothing here imports
torch, so that `--help` and a mistyped key answer at once.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from seer_scale.config.data_section import DataSection
from seer_scale.config.field_types import Section, Text
from seer_scale.config.output_sections import (
    CheckpointSection,
    EvalSection,
    ProfileSection,
    TrackingSection,
)
from seer_scale.config.sharding_section import ShardingSection
from seer_scale.config.training_sections import (
    ModelSection,
    ObjectiveSection,
    OptimSection,
    RunSection,
    TrainSection,
)


class RunConfig(Section):
    """All keys of a run, resolved; a run writes them to `config.yaml` in its folder."""

    recipe: Text = Field(description="name of the recipe this run started from")
    run: RunSection
    train: TrainSection
    model: ModelSection
    objective: ObjectiveSection
    optim: OptimSection
    sharding: ShardingSection
    data: DataSection
    checkpoint: CheckpointSection
    tracking: TrackingSection
    eval: EvalSection = Field(default_factory=lambda: EvalSection.model_validate({}))
    profile: ProfileSection = Field(default_factory=lambda: ProfileSection.model_validate({}))

    @model_validator(mode="after")
    def _profile_is_of_the_run(self) -> Self:
        steps = self.profile.steps
        if steps is not None and self.train.steps and steps[1] > self.train.steps:
            raise ValueError(
                f"profile.steps is {list(steps)}, but train.steps is {self.train.steps}: profile "
                "steps that the run has, or set profile.steps=null"
            )
        return self
