"""The typed, frozen, strict configuration of a run: one owner for every number.

Sections are plain data; numbers that follow from others (global batch, learning rates) are
functions elsewhere and never written back. Nothing here imports torch, so that `--help` and a
mistyped key answer at once.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, Strict, model_validator

TRUNK_STRIDE = 32  # a smaller crop would leave no pixel for the last stage

Text = Annotated[str, Field(min_length=1)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
# torch is seeded with this shifted left by 20 bits, which has to fit its 64.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML has lists only: the outer container is converted, what is inside stays strict.
PositiveInts = Annotated[tuple[Positive, ...], Strict(False), Field(min_length=1)]
CropSide = Annotated[int, Field(ge=TRUNK_STRIDE)]
CropSizes = Annotated[tuple[CropSide, ...], Strict(False), Field(min_length=1)]
Scale = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)]
Scales = Annotated[tuple[Scale, ...], Strict(False), Field(min_length=1)]
StepRange = Annotated[tuple[Positive, Positive], Strict(False)]
Ranks = Annotated[tuple[NonNegative, ...], Strict(False), Field(min_length=1)]
BlockGroups = Annotated[tuple[Annotated[tuple[Positive, ...], Strict(False)], ...], Strict(False)]


# The pattern in words, for --help and the sentence after a mistake.
Checkpointing = Annotated[
    str,
    Field(
        pattern=r"^(none|full|groups|auto:(\d+(\.\d+)?|\.\d+))$",
        json_schema_extra={"allowed": "none, full, groups or auto:GIB (e.g. auto:12.5)"},
    ),
]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class RunSection(Section):
    dir: Text = Field(description="folder of this run")
    seed: Seed = Field(0, description="seed of initial values, sample order, augmentation")
    log_samples: bool = Field(False, description="write every step's sample ids to samples.jsonl")
    hang_minutes: PositiveFloat = Field(
        30.0, description="a step that takes longer ends the run with the names of missing ranks"
    )
    threads: Positive | None = Field(
        None,
        description="threads of a rank on a CPU; null means OMP_NUM_THREADS, or without it the "
        "rank's share of the physical cores",
    )
    gc_every: Positive = Field(
        50, description="steps between two runs of Python's garbage collector, on all ranks at once"
    )
    peak_tflops: PositiveFloat | None = Field(
        None,
        description="TFLOP/s of a rank's device at train.precision, for mfu and hfu; null means "
        "those of the hardware profile of its name",
    )


class TrainSection(Section):
    steps: Positive = Field(description="optimizer steps of the whole run")
    micro_batch_size: Positive = Field(description="images per rank and forward pass")
    gradient_accumulation: Positive = Field(
        1, description="micro-batches per step; codes are still computed on one micro-batch"
    )
    precision: Literal["fp32", "bf16", "amp-o1", "apex-o1"] = Field(
        "fp32",
        description="of convolutions and matrix products; the state is always float32. amp-o1: "
        "float16 by torch, with loss scaling; apex-o1: by NVIDIA Apex",
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = Field(
        "auto",
        description="of crops and activations; auto: channels_last on a CPU, where it was measured "
        "to be faster, else contiguous",
    )
    compile: bool = Field(
        False,
        description="torch.compile block by block; takes minutes at the start, and is slower on a "
        "CPU: docs/performance.md",
    )
    max_nonfinite: Positive | None = Field(
        None,
        description="steps in a row with a loss that is not finite, each left out, that end the "
        "run; null means 3, or 1 where tensors step one by one (fuse_backward, nvme)",
    )
    on_spike: Literal["continue", "skip", "rewind"] = Field(
        "continue",
        description="what to do about a loss that jumps: say so, leave the update out, or go back "
        "to the last checkpoint and on with the images after it",
    )
    spike_mads: PositiveFloat = Field(
        10.0,
        description="how far above the median of the last 64 losses a spike is, in their median "
        "distances from it",
    )
    max_rewinds: Positive = Field(
        3, description="on_spike=rewind: times to one checkpoint, after which the run ends"
    )


class ModelSection(Section):
    trunk: Text = Field(description="name in seer_scale.models.TRUNKS")
    head_dims: PositiveInts = Field(
        description="widths of the projection head after the trunk, e.g. [8192, 8192, 256]"
    )
    head_batch_norm: bool = Field(
        False, description="BatchNorm after every hidden layer of the head"
    )
    prototypes: Annotated[int, Field(ge=2)] = Field(description="number of prototypes K")
    align_channels: Positive = Field(
        1,
        description="train with the trunk's channel groups padded with zeros to a multiple of "
        "this, e.g. 8 for tensor cores: the same function, and nothing that is saved has them",
    )

    @model_validator(mode="after")
    def _batch_norm_has_a_place(self) -> Self:
        if self.head_batch_norm and len(self.head_dims) == 1:
            raise ValueError(
                f"model.head_batch_norm is true, but a head of model.head_dims "
                f"{list(self.head_dims)} has no hidden layer to put BatchNorm after: add a width, "
                f"or set model.head_batch_norm=false"
            )
        return self


class ObjectiveSection(BaseModel):
    """`name` and the keyword arguments of that objective's constructor, checked against it."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    name: Text = Field("swav", description="swav, simclr or an installed plug-in")

    @property
    def options(self) -> dict[str, Any]:
        """The objective's own keyword arguments."""
        return dict(self.model_extra or {})


class OptimSection(Section):
    base_lr: PositiveFloat = Field(0.3, description="learning rate per 256 images of global batch")
    lr: PositiveFloat | None = Field(
        None, description="peak learning rate; null means base_lr * global batch / 256"
    )
    momentum: Annotated[float, Field(ge=0, lt=1)] = Field(0.9, description="momentum of SGD")
    nesterov: bool = Field(False, description="Nesterov's momentum")
    weight_decay: NonNegativeFloat = Field(
        1e-5, description="on every tensor, BatchNorm and biases too"
    )
    larc: bool = Field(True, description="scale each tensor's update by LARC (clip off)")
    trust_coefficient: PositiveFloat = Field(1e-3, description="LARC's trust coefficient")
    schedule: Literal["cosine", "constant"] = Field("cosine", description="after the warm-up")
    warmup_steps: NonNegative = Field(
        0,
        description="linear warm-up from the learning rate of one node's batch (peak / nodes), "
        "on a single node from peak * end_lr_ratio",
    )
    end_lr_ratio: Fraction = Field(
        1e-3, description="last learning rate of cosine, as a share of the peak"
    )
    freeze_prototypes_steps: NonNegative = Field(
        313, description="first steps in which the prototypes do not move"
    )
    fuse_backward: bool = Field(
        False,
        description="step each tensor as soon as its gradient is complete and free it: no memory "
        "for gradients; ddp on one rank, fsdp and hsdp",
    )
    momentum_on_host: bool = Field(
        False, description="keep momentum in host memory; ddp, fsdp and hsdp on a GPU"
    )


class ShardingSection(Section):
    strategy: Literal["ddp", "fsdp", "hsdp", "zero", "fairscale"] = Field(
        "ddp", description="zero needs --deepspeed_config and is implied by it"
    )
    deepspeed_config: Text | None = Field(None, description="path given as --deepspeed_config")
    shard_size: Positive | None = Field(
        None, description="hsdp: ranks that share one copy of the model; null means a node's"
    )
    reshard_after_forward: bool = Field(
        True, description="fsdp, hsdp: free weights after use in the forward pass, gather again"
    )
    prefetch: NonNegative = Field(1, description="fsdp, hsdp: units gathered ahead of their use")
    unit_parameters: Positive = Field(
        200_000_000,
        description="fsdp, hsdp: a layer of more parameters than this is gathered by itself, "
        "others with their block",
    )
    activation_checkpointing: Checkpointing = Field(
        "none",
        description="recompute no block, every block, groups of blocks, or as few blocks as fit "
        "their activations into that many GiB",
    )
    checkpoint_groups: BlockGroups | None = Field(
        None,
        description="for groups: per stage the ends of its groups of blocks, "
        "e.g. [[2], [7], [9, 17], []]; a stage with none is not recomputed",
    )
    syncbn: Literal["native", "apex"] = Field(
        "native", description="the project's grouped SyncBatchNorm, or NVIDIA Apex's layer"
    )
    sync_bn_group_size: Annotated[int, Field(ge=-1)] = Field(
        0, description="ranks that share BatchNorm statistics: 0 all, -1 a node, n groups of n"
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
                f"sharding.checkpoint_groups is {_lists(groups)}, but "
                f"sharding.activation_checkpointing is {mode}: set it to groups, or "
                f"sharding.checkpoint_groups=null"
            )
        for ends in groups or ():
            if list(ends) != sorted(set(ends)):
                raise ValueError(
                    f"sharding.checkpoint_groups is {_lists(groups)}, but the ends "
                    f"{list(ends)} of one stage do not ascend"
                )
        return self


class DataSection(Section):
    path: Text = Field(
        description="an image folder, a tar shard, a folder or a pattern of shards, a manifest of "
        "shards (.jsonl, .parquet); http(s)://, s3:// or any other address fsspec knows"
    )
    crop_sizes: CropSizes = Field(description="pixels, one per resolution, e.g. [224, 96]")
    crop_counts: PositiveInts = Field(description="crops per resolution, e.g. [2, 4]")
    crop_scales: Scales | None = Field(
        None,
        description="smallest and largest share of the image's area; null means [0.14, 1.0] for "
        "the first resolution and [0.05, 0.14] for the others",
    )
    color_distortion: NonNegativeFloat = Field(1.0, description="strength of colour jitter")
    blur_probability: Fraction = Field(0.5, description="Gaussian blur, radius 0.1 to 2 pixels")
    augment_on: Literal["host", "device"] = Field(
        "host",
        description="who flips, distorts colours and blurs: the loader's threads, or the device "
        "in batches",
    )
    workers: NonNegative = Field(
        4,
        description="threads per rank that read and cut, in a process of their own; 0: in the "
        "trainer",
    )
    prefetch: Positive = Field(4, description="micro-batches made ahead, per rank")
    window: Positive = Field(16, description="shards whose images are mixed with each other")
    refresh: (
        Annotated[
            str,
            Field(
                pattern=r"^every [1-9]\d* (steps|hours)$",
                json_schema_extra={"allowed": "every N steps or every N hours"},
            ),
        ]
        | None
    ) = Field(None, description="when a manifest is read again; null means never")
    max_age_days: Positive | None = Field(
        90, description="with refresh, shards published longer ago leave; null keeps them"
    )
    max_bad_fraction: Fraction = Field(
        0.2, description="share of unusable images, over the last 1000, that ends the run"
    )
    cache_dir: Text | None = Field(
        None, description="for copies of remote shards; null means ~/.cache/seer-scale/shards"
    )
    cache_gib: PositiveFloat = Field(50.0, description="size limit of that folder")

    @model_validator(mode="after")
    def _crops_fit_together(self) -> Self:
        sizes, counts, scales = list(self.crop_sizes), list(self.crop_counts), self.crop_scales
        if len(sizes) != len(counts):
            raise ValueError(
                f"data.crop_sizes and data.crop_counts need one entry per resolution each, but "
                f"have {len(sizes)} ({sizes}) and {len(counts)} ({counts})"
            )
        if scales is not None and len(scales) != len(sizes):
            raise ValueError(
                f"data.crop_scales needs one entry per resolution, but has {len(scales)} "
                f"({_lists(scales)}) for data.crop_sizes {sizes}: name them all, or set "
                f"data.crop_scales=null for the usual ones"
            )
        for low, high in self.scales:
            if not low < high <= 1:
                raise ValueError(
                    f"data.crop_scales holds [{low}, {high}], but a scale is [smallest, largest] "
                    f"with 0 < smallest < largest <= 1"
                )
        if sum(self.crop_counts) < 2:
            raise ValueError(
                f"data.crop_counts is {list(self.crop_counts)}, but an image needs at least 2 "
                f"crops, since the objective compares one with another"
            )
        return self

    @property
    def scales(self) -> tuple[tuple[float, float], ...]:
        """`crop_scales`, or SwAV's: large crops of the first resolution, small ones of the rest."""
        return self.crop_scales or ((0.14, 1.0), *[(0.05, 0.14)] * (len(self.crop_sizes) - 1))

    @property
    def refresh_every(self) -> tuple[int, Literal["steps", "hours"]] | None:
        """The number and the unit of `refresh`."""
        if self.refresh is None:
            return None
        _, number, unit = self.refresh.split()
        return int(number), "steps" if unit == "steps" else "hours"


class CheckpointSection(Section):
    every: Positive = Field(1000, description="steps between checkpoints; the last step is saved")
    keep: Positive = Field(2, description="newest checkpoints that stay")
    keep_every: Positive | None = Field(
        None, description="checkpoints at multiples of these steps stay for good"
    )


class EvalSection(Section):
    every: Positive | None = Field(
        None,
        description="steps between two kNN evaluations, each of a checkpoint that is saved for it; "
        "the last step is evaluated too; null means never",
    )
    data: Text | None = Field(
        None, description="labelled images: a folder with train and val below it, or TRAIN,VAL"
    )
    size: CropSide = Field(224, description="pixels of the middle crop")
    k: Positive = Field(20, description="neighbours that vote")
    temperature: PositiveFloat = Field(0.07, description="a vote weighs exp(cosine / temperature)")
    images: Positive = Field(20_000, description="most images that are used of train and of val")
    batch: Positive = Field(64, description="images per rank and forward pass")
    prototypes: NonNegative = Field(
        8, description="prototypes whose nearest images are drawn on a sheet; 0: no sheet"
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
        None, description="first and last step to profile, e.g. [20, 22]; null means none"
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
    uri: Text | None = Field(
        None, description="MLflow server; null means MLFLOW_TRACKING_URI or sqlite:///mlflow.db"
    )
    experiment: Text = Field("seer-scale", description="MLflow experiment")
    registered_name: Text | None = Field(None, description="MLflow registered model")
    log_models: bool = Field(True, description="log every kept checkpoint's trunk as a model")
    checkpoints: Literal["none", "reference", "copy"] = Field(
        "reference",
        description="what of a checkpoint becomes an artifact, for --resume mlflow:RUN_ID: "
        "nothing, its path, or all of its files",
    )
    system_metrics: bool = Field(True, description="CPU, memory and GPU figures of rank 0's node")


class RunConfig(Section):
    """Everything a run depends on, resolved; written to `config.yaml` beside its results."""

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
        if steps is not None and steps[1] > self.train.steps:
            raise ValueError(
                f"profile.steps is {list(steps)}, but train.steps is {self.train.steps}: profile "
                "steps that the run has, or set profile.steps=null"
            )
        return self


def _lists(rows: tuple[tuple[Any, ...], ...] | None) -> list[list[Any]]:
    return [list(row) for row in rows or ()]
