"""Sections `run`, `train`, `model`, `objective` and `optim` of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from seer_scale.config.field_types import (
    Count,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    PositiveFloat,
    PositiveInts,
    Section,
    Seed,
    Text,
)

# What a recipe may leave open. config/batches.py works it out: no number of a RunConfig that
# `recipe.parse` returns is None.
OPEN: Any = None


class RunSection(Section):
    dir: PathText = Field(description="folder of this run: checkpoints, metrics, configuration")
    seed: Seed = Field(0, description="seed of initial values, sample order and augmentation")
    log_samples: bool = Field(
        False, description="expert: write the ids of every step's images to samples.jsonl"
    )
    hang_minutes: PositiveFloat = Field(
        30.0,
        description=(
            "minutes that a step, a save or an evaluation may take; a longer one ends the run and "
            "names the missing ranks; a step in which all ranks are stuck ends it sooner"
        ),
    )
    threads: Positive | None = Field(
        None,
        description=(
            "expert: CPU threads of a rank; null means OMP_NUM_THREADS if set, else the "
            "rank's share of the physical cores"
        ),
    )
    gc_every: Positive = Field(
        50,
        description=(
            "expert: steps between two runs of Python's garbage collector, on all ranks at once"
        ),
    )
    peak_tflops: PositiveFloat | None = Field(
        None,
        description=(
            "expert: peak TFLOP/s of a rank's device at train.precision, for mfu and hfu; "
            "null means the peak in the device's hardware profile"
        ),
    )


class TrainSection(Section):
    images: Count = Field(
        OPEN,
        description="images seen in the whole run, e.g. 1e9; train.steps follows from them",
    )
    global_batch: Positive = Field(
        OPEN, description="images per optimizer step, over all ranks and micro-batches"
    )
    steps: Positive = Field(
        OPEN, description="optimizer steps of the whole run; given, it wins over train.images"
    )
    micro_batch_size: Positive = Field(
        OPEN,
        description=(
            "images per rank and forward pass; a recipe gives the largest, and as many are taken "
            "as make up train.global_batch; given on the command line, it stays as it is, and the "
            "global batch follows"
        ),
    )
    gradient_accumulation: Positive = Field(
        1,
        description=(
            "micro-batches per optimizer step, which follow from train.global_batch unless given; "
            "codes are computed on one micro-batch"
        ),
    )
    precision: Literal["fp32", "bf16", "amp-o1", "apex-o1"] = Field(
        "fp32",
        description=(
            "precision of convolutions and matrix products; weights and optimizer state are"
            " always float32. amp-o1: float16 by torch, with loss scaling; apex-o1: float16"
            " by NVIDIA Apex"
        ),
    )
    memory_format: Literal["auto", "contiguous", "channels_last"] = Field(
        "auto",
        description=(
            "expert: memory format of crops and activations; auto means channels_last on a "
            "CPU and contiguous on a GPU"
        ),
    )
    compile: bool = Field(
        False,
        description=(
            "expert: torch.compile block by block; takes minutes at the start and is slower"
            " on a CPU: docs/performance.md"
        ),
    )
    max_nonfinite: Positive | None = Field(
        None,
        description=(
            "end the run after this many consecutive non-finite steps (each is skipped); "
            "null means 3, or 1 where tensors are updated one by one (fuse_backward, nvme)"
        ),
    )
    on_spike: Literal["continue", "skip", "rewind"] = Field(
        "continue",
        description=(
            "reaction to a loss spike: continue with a warning, skip the update, or rewind "
            "to the last checkpoint and continue with the images after the spike"
        ),
    )
    spike_mads: PositiveFloat = Field(
        10.0,
        description=(
            "expert: threshold of a loss spike above the median of the last 64 losses, in "
            "median absolute deviations"
        ),
    )
    max_rewinds: Positive = Field(
        3, description="with on_spike=rewind: rewinds to the same checkpoint before the run stops"
    )


class ModelSection(Section):
    trunk: Text = Field(description="trunk, a name in seer_scale.models.TRUNKS")
    head_dims: PositiveInts = Field(
        description="widths of the projection head after the trunk, e.g. [8192, 8192, 256]"
    )
    head_batch_norm: bool = Field(
        False, description="BatchNorm after every hidden layer of the head"
    )
    prototypes: Annotated[int, Field(ge=2)] = Field(description="number of prototypes K")
    align_channels: Positive = Field(
        1,
        description=(
            "expert: pad the trunk's channel groups with zeros to a multiple of this, e.g. "
            "8 for tensor cores; the function stays the same, and saved files have no "
            "padding"
        ),
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

    name: Text = Field("swav", description="objective: swav, simclr or an installed plug-in")

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
    weight_decay: NonNegativeFloat = Field(
        1e-5, description="weight decay of every tensor, BatchNorm and biases included"
    )
    larc: bool = Field(True, description="scale each tensor's update by LARC, without clipping")
    trust_coefficient: PositiveFloat = Field(1e-3, description="LARC's trust coefficient")
    schedule: Literal["cosine", "constant"] = Field(
        "cosine", description="learning rate after the warm-up"
    )
    warmup_steps: NonNegative = Field(
        0,
        description=(
            "steps of linear warm-up, from peak / nodes (on a single node from peak * end_lr_ratio)"
        ),
    )
    warmup_share: Fraction | None = Field(
        None, description="warm-up as a share of the run, instead of warmup_steps"
    )
    end_lr_ratio: Fraction = Field(
        1e-3, description="last learning rate of the cosine schedule, as a share of the peak"
    )
    freeze_prototypes_steps: NonNegative = Field(
        313, description="first steps, in which the prototypes stay fixed"
    )
    freeze_prototypes_share: Fraction | None = Field(
        None,
        description="share of the run with fixed prototypes, instead of freeze_prototypes_steps",
    )
    fuse_backward: bool = Field(
        False,
        description=(
            "update each tensor as soon as its gradient is complete, then free the "
            "gradient; ddp on one rank, fsdp and hsdp"
        ),
    )
    momentum_on_host: bool = Field(
        False, description="keep momentum in host memory; ddp, fsdp and hsdp on a GPU"
    )
