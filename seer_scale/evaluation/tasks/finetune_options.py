"""What can be chosen about fine-tuning; defaults are VISSL's for ImageNet at 224 pixels."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from seer_scale import distributed
from seer_scale.errors import UserError
from seer_scale.evaluation.task import TaskOptions
from seer_scale.models.regnet import trunk_config
from seer_scale.optim.schedules import scaled_lr

Epochs = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field()]


class Options(TaskOptions):
    """Of `finetune`."""

    epochs: int = Field(105, gt=0, description="passes over the training images")
    batch: int = Field(256, gt=0, description="images per step, over all processes")
    accumulate: int = Field(1, gt=0, description="forward passes a step's batch is made in")
    base_lr: float = Field(0.1, gt=0, description="learning rate per 256 images of the batch")
    schedule: Literal["step", "cosine"] = Field("step", description="of the learning rate")
    lr_steps: Epochs = Field((30, 60, 90, 100), description="epochs after which it falls")
    lr_gamma: float = Field(0.1, gt=0, le=1, description="factor by which it falls")
    warmup_epochs: float = Field(0.0, ge=0, description="linear rise of it at the beginning")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    nesterov: bool = Field(True, description="Nesterov's momentum")
    weight_decay: float = Field(0.0, ge=0, description="on every tensor but those of BatchNorm")
    size: int = Field(224, ge=32, description="pixels of a training crop")
    test_size: int | None = Field(None, ge=32, description="of a test crop; null: as `size`")
    test_resize: int | None = Field(
        None, ge=32, description="shorter side before the test crop; null: 8/7 of its size"
    )
    bicubic: bool = Field(False, description="interpolation; bilinear else")
    colour_distortion: float = Field(0.0, ge=0, le=2.5, description="strength of SwAV's; 0: none")
    blur: float = Field(0.0, ge=0, le=1, description="share of training crops that are blurred")
    freeze: int = Field(0, ge=0, description="first stages, and the stem, that stay as they are")
    train_list: str | None = Field(None, description="file of training images' names: a subset")
    labels: str | None = Field(None, description="CSV or TSV of `name,class` of every image")
    precision: Literal["fp32", "bf16", "amp-o1"] = Field("fp32", description="as train.precision")
    strategy: Literal["ddp", "fsdp", "zero"] = Field("ddp", description="as sharding.strategy")
    deepspeed_config: str | None = Field(None, description="JSON of strategy zero")
    activation_checkpointing: Literal["none", "full"] = Field(
        "none", description="full recomputes every block in the backward pass"
    )
    test_every: int = Field(0, ge=0, description="epochs between tests; 0: at the end only")
    workers: int = Field(4, ge=1, description="threads per process that decode images")
    seed: int = Field(0, ge=0, lt=2**32, description="of order, crops and the new classifier")

    @model_validator(mode="after")
    def _zero_has_its_file(self) -> Self:
        if (self.strategy == "zero") != (self.deepspeed_config is not None):
            raise ValueError(
                f"strategy={self.strategy} and deepspeed_config={self.deepspeed_config}: strategy "
                "zero, and no other, takes a DeepSpeed JSON such as ds_configs/zero2.json"
            )
        return self


def check(options: Options, trunk: str, *, images: int) -> None:
    """Refuses what cannot be trained.

    Raises:
        UserError: one sentence with the option, its value and what is possible.
    """
    stages, world = len(trunk_config(trunk).stages), distributed.world_size()
    if options.freeze > stages:
        raise UserError(f"freeze={options.freeze}, but {trunk} has {stages} stages")
    if options.batch > images:
        raise UserError(
            f"batch={options.batch}, but there are {images} training images: set batch={images} "
            "or less"
        )
    if options.batch % (world * options.accumulate):
        raise UserError(
            f"batch={options.batch} cannot be split evenly over {world} processes and "
            f"accumulate={options.accumulate}: choose a multiple of {world * options.accumulate}"
        )


def learning_rate(options: Options, step: int, steps_per_epoch: int) -> float:
    """Of step `step`, counted from 0; the warm-up rises to what the schedule has there."""
    epoch = step / steps_per_epoch
    rate = scaled_lr(options.base_lr, options.batch)
    if options.schedule == "cosine":
        rate *= (1 + math.cos(math.pi * epoch / options.epochs)) / 2
    else:
        rate *= options.lr_gamma ** sum(epoch >= end for end in options.lr_steps)
    return rate * min(1.0, (step + 1) / max(1.0, options.warmup_epochs * steps_per_epoch))
