"""Section `sharding` of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from seer_scale.config.field_types import (
    BlockGroups,
    Checkpointing,
    NonNegative,
    PathText,
    Positive,
    Section,
    as_lists,
)


class ShardingSection(Section):
    strategy: Literal["ddp", "fsdp", "hsdp", "zero", "fairscale"] = Field(
        "ddp",
        description=(
            "sharding strategy; --deepspeed_config selects zero, and zero needs --deepspeed_config"
        ),
    )
    deepspeed_config: PathText | None = Field(
        None, description="path of the DeepSpeed JSON, set by --deepspeed_config"
    )
    shard_size: Positive | None = Field(
        None,
        description="hsdp: ranks that share one copy of the model; null means the ranks of a node",
    )
    reshard_after_forward: bool = Field(
        True,
        description=(
            "expert: fsdp, hsdp, fairscale: free weights after use in the forward pass and "
            "gather them again in the backward pass"
        ),
    )
    prefetch: NonNegative = Field(
        1, description="expert: fsdp, hsdp: units gathered ahead of their use"
    )
    unit_parameters: Positive = Field(
        200_000_000,
        description=(
            "expert: fsdp, hsdp, fairscale: gather a layer of more parameters than this by "
            "itself, and other layers with their block"
        ),
    )
    activation_checkpointing: Checkpointing = Field(
        "none",
        description=(
            "blocks to recompute in the backward pass: none, all (full), groups of blocks, "
            "or as few as fit all activations into GIB (auto:GIB)"
        ),
    )
    checkpoint_groups: BlockGroups | None = Field(
        None,
        description=(
            "with groups: for each stage the last blocks of its groups, e.g. [[2], [7], [9,"
            " 17], []]; an empty list recomputes nothing of the stage"
        ),
    )
    syncbn: Literal["native", "apex"] = Field(
        "native", description="expert: the project's grouped SyncBatchNorm, or NVIDIA Apex's layer"
    )
    sync_bn_group_size: Annotated[int, Field(ge=-1)] = Field(
        0,
        description=(
            "ranks that share BatchNorm statistics: 0 for all ranks, -1 for the ranks of a "
            "node, n for groups of n ranks"
        ),
    )

    @model_validator(mode="after")
    def _strategy_matches_its_options(self) -> Self:
        if self.strategy == "zero" and self.deepspeed_config is None:
            raise ValueError(
                "sharding.strategy is zero, but no DeepSpeed config is given: add "
                "--deepspeed_config FILE, e.g. ds_configs/zero2.json"
            )
        if self.strategy != "zero" and self.deepspeed_config is not None:
            raise ValueError(
                f"sharding.strategy is {self.strategy}, but sharding.deepspeed_config is "
                f"{self.deepspeed_config!r}, which only strategy zero reads: leave out "
                f"one of the two"
            )
        return self

    @property
    def activation_budget(self) -> float | None:
        """GiB that `activation_checkpointing: auto:GIB` allows."""
        mode, _, gib = self.activation_checkpointing.partition(":")
        return float(gib) if mode == "auto" else None

    @model_validator(mode="after")
    def _groups_match_the_mode(self) -> Self:
        mode, groups = self.activation_checkpointing, self.checkpoint_groups
        if mode == "groups" and groups is None:
            raise ValueError(
                "sharding.activation_checkpointing is groups, but sharding.checkpoint_groups is "
                "not given: name the groups of each stage, e.g. [[2], [7], [9, 17], []]"
            )
        if mode != "groups" and groups is not None:
            raise ValueError(
                f"sharding.checkpoint_groups is {as_lists(groups)}, but "
                f"sharding.activation_checkpointing is {mode}: set it to groups, or "
                f"sharding.checkpoint_groups=null"
            )
        for ends in groups or ():
            if list(ends) != sorted(set(ends)):
                raise ValueError(
                    f"sharding.checkpoint_groups is {as_lists(groups)}, but the ends "
                    f"{list(ends)} of one stage do not ascend"
                )
        return self
