"""The options of every task, which `seer-scale evaluate TASK` takes as `key=value`.

Nothing here imports torch, so that `--help` answers at once. The module of each task offers its
model as `Options`, for example `seer_scale.evaluation.tasks.knn.Options`, and names the published
protocol that the defaults come from.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from seer_scale.config.field_types import PathText

Numbers = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]
Epochs = tuple[Annotated[int, Field(gt=0)], ...]


class TaskOptions(BaseModel):
    """Base of the options of a task: frozen, without unknown keys, a description for each key."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class KnnOptions(TaskOptions):
    """Options of the task `knn`."""

    k: list[int] = Field(
        [10, 20, 50, 100, 200], min_length=1, description="numbers of neighbours to try"
    )
    temperature: list[float] = Field(
        [0.07],
        min_length=1,
        description="temperatures to try; a neighbour's vote weighs exp(cosine / temperature)",
    )
    size: int = Field(224, gt=0, description="side of the centre crop in pixels")
    map: str = Field("avgpool", description="feature map; see docs/evaluation.md")

    @field_validator("k", "temperature", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | float) else value

    @field_validator("k", "temperature")
    @classmethod
    def _positive(cls, values: list[float]) -> list[float]:
        if min(values) <= 0:
            raise ValueError("every value must be above 0")
        return values


class LinearOptions(TaskOptions):
    """Options of the task `linear`; the defaults are VISSL's for ImageNet."""

    maps: list[str] | None = Field(
        None,
        description="feature maps, each with its own head; null means those that VISSL probes: the "
        "last two stages and avgpool. NAME_3x1 gives a stage's cells, NAME_plain a head without "
        "BatchNorm",
    )
    benchmark: Literal["imagenet", "places205", "inat18"] = Field(
        "imagenet", description="dataset whose published maps are probed if maps is null"
    )
    base_lr: list[float] = Field(
        [0.01],
        min_length=1,
        description="learning rates per 256 images; every map gets one head for each",
    )
    epochs: int = Field(28, gt=0, description="passes over the training images")
    lr_steps: list[int] = Field(
        [8, 16, 24], description="epochs after which the learning rate is multiplied by lr_gamma"
    )
    lr_gamma: float = Field(0.1, gt=0, le=1, description="factor of the learning rate at lr_steps")
    weight_decay: float = Field(5e-4, ge=0, description="weight decay of the linear layers")
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    nesterov: bool = Field(True, description="use Nesterov's momentum")
    batch: int = Field(256, gt=1, description="images per step, over all processes")
    size: int = Field(224, gt=0, description="side of the crops in pixels")
    augment: bool = Field(
        True,
        description="train on random resized crops and flips; false computes the features of "
        "centre crops once",
    )
    solver: Literal["sgd", "lbfgs"] = Field(
        "sgd",
        description="lbfgs solves logistic regression on standardised features exactly and needs "
        "augment=false",
    )
    seed: int = Field(0, ge=0, description="seed of the order, the crops and the initial values")


class LowshotOptions(TaskOptions):
    """Options of the task `lowshot`."""

    fractions: list[float] = Field(
        [0.01, 0.1], description="splits by share of each class's training images"
    )
    per_class: list[int] = Field([], description="splits by number of images of each class")
    train_list: PathText | None = Field(
        None, description="file with the names of the training images, instead of splits"
    )
    seeds: list[int] = Field([0], min_length=1, description="every split is drawn for each seed")
    method: Literal["linear", "finetune"] = Field(
        "linear", description="train a classifier on frozen features, or fine-tune the whole trunk"
    )
    weight_decay: float = Field(
        1e-2,
        ge=0,
        description="method=linear: weight decay of the classifier on standardised features",
    )
    size: int = Field(224, gt=0, description="method=linear: side of the centre crop in pixels")
    map: str = Field("avgpool", description="method=linear: feature map")
    finetune: dict[str, Any] = Field(
        {}, description="method=finetune: options of that task, as {epochs: 70, base_lr: 0.05}"
    )


class FinetuneOptions(TaskOptions):
    """Options of the task `finetune`; the defaults are VISSL's for ImageNet at 224 pixels."""

    epochs: int = Field(105, gt=0, description="passes over the training images")
    batch: int = Field(256, gt=0, description="images per step, over all processes")
    accumulate: int = Field(1, gt=0, description="forward passes that share the batch of a step")
    base_lr: float = Field(0.1, gt=0, description="learning rate per 256 images of the batch")
    schedule: Literal["step", "cosine"] = Field("step", description="shape of the learning rate")
    lr_steps: Epochs = Field(
        (30, 60, 90, 100),
        description="schedule=step: epochs after which the learning rate is multiplied by lr_gamma",
    )
    lr_gamma: float = Field(0.1, gt=0, le=1, description="factor of the learning rate at lr_steps")
    warmup_epochs: float = Field(
        0.0, ge=0, description="epochs in which the learning rate rises linearly at the start"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    nesterov: bool = Field(True, description="use Nesterov's momentum")
    weight_decay: float = Field(
        0.0, ge=0, description="weight decay of every tensor except those of BatchNorm"
    )
    size: int = Field(224, ge=32, description="side of a training crop in pixels")
    test_size: int | None = Field(
        None, ge=32, description="side of a test crop in pixels; null means `size`"
    )
    test_resize: int | None = Field(
        None,
        ge=32,
        description="shorter side of a test image before it is cropped; null means 8/7 of the crop",
    )
    bicubic: bool = Field(False, description="interpolate bicubically instead of bilinearly")
    colour_distortion: float = Field(
        0.0, ge=0, le=2.5, description="strength of SwAV's colour distortion; 0 means none"
    )
    blur: float = Field(0.0, ge=0, le=1, description="share of training crops that are blurred")
    freeze: int = Field(
        0,
        ge=0,
        description="number of first stages that are not trained; 1 or more includes the stem",
    )
    train_list: PathText | None = Field(
        None, description="file with the names of the training images to use"
    )
    labels: PathText | None = Field(
        None, description="another spelling of --labels: file of `name,class` for every image"
    )
    precision: Literal["fp32", "bf16", "amp-o1"] = Field(
        "fp32", description="number format, as train.precision of a run"
    )
    strategy: Literal["ddp", "fsdp", "zero"] = Field(
        "ddp", description="sharding strategy, as sharding.strategy of a run"
    )
    deepspeed_config: PathText | None = Field(
        None, description="strategy=zero: path of the DeepSpeed JSON file"
    )
    activation_checkpointing: Literal["none", "full"] = Field(
        "none", description="full computes every block again in the backward pass"
    )
    test_every: int = Field(0, ge=0, description="epochs between tests; 0 tests only at the end")
    workers: int = Field(4, ge=1, description="threads per process that decode images")
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the order, the crops and the new classifier"
    )

    @model_validator(mode="after")
    def _zero_has_its_file(self) -> Self:
        if (self.strategy == "zero") != (self.deepspeed_config is not None):
            raise ValueError(
                f"strategy={self.strategy} and deepspeed_config={self.deepspeed_config} do not fit "
                "together: strategy=zero, and no other strategy, takes a DeepSpeed JSON such as "
                "ds_configs/zero2.json"
            )
        return self


class SvmOptions(TaskOptions):
    """Options of the task `svm`; the defaults are VISSL's for VOC 2007."""

    costs: list[float] = Field(
        [0.01, 0.1, 1, 2, 5, 10, 15, 20, 50, 100, 1000],
        min_length=1,
        description="costs to try for each class",
    )
    folds: int = Field(3, ge=2, description="number of folds of the cross-validation")
    positive_weight: float = Field(
        2.0, gt=0, description="weight of an image with the class; the others weigh 1"
    )
    max_iter: int = Field(2000, gt=0, description="largest number of the solver's passes")
    size: int = Field(224, gt=0, description="side of the centre crop in pixels")
    map: str = Field("avgpool", description="feature map; see docs/evaluation.md")
    seed: int = Field(0, ge=0, description="seed of the solver's order")


class TransferOptions(TaskOptions):
    """Options of the task `transfer`."""

    method: Literal["linear", "finetune"] = Field(
        "linear", description="train heads on frozen features, or fine-tune the whole trunk"
    )
    options: dict[str, Any] = Field(
        {}, description="options of the task `method`, as {epochs: 14, lr_steps: [4, 8, 12]}"
    )


class DetectOptions(TaskOptions):
    """Options of the task `detect`; the defaults are VISSL's for COCO."""

    iterations: int = Field(90_000, gt=0, description="steps of the optimizer")
    batch: int = Field(16, gt=0, description="images per step, over all processes")
    lr: float = Field(0.02, gt=0, description="learning rate")
    lr_steps: Numbers = Field(
        (60_000, 80_000),
        description="steps after which the learning rate is multiplied by lr_gamma",
    )
    lr_gamma: float = Field(0.1, gt=0, le=1, description="factor of the learning rate at lr_steps")
    warmup: int = Field(
        100, ge=0, description="steps in which the learning rate rises linearly at the start"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="momentum of SGD")
    weight_decay: float = Field(1e-4, ge=0, description="weight decay of every trained tensor")
    batch_norm: Literal["frozen", "sync"] = Field(
        "sync",
        description="sync shares BatchNorm's statistics over all processes, in the pyramid too; "
        "frozen keeps those of the trunk",
    )
    masks: bool = Field(
        True, description="train Mask R-CNN; false trains Faster R-CNN, which finds boxes only"
    )
    min_sizes: Numbers = Field(
        (640, 672, 704, 736, 768, 800),
        description="shorter sides of training images in pixels; a test image gets the last one",
    )
    max_size: int = Field(1333, gt=0, description="largest longer side of an image in pixels")
    channels: int = Field(
        256, gt=0, description="channels of the pyramid and the mask head; the box head has 4x"
    )
    anchors: Numbers = Field(
        (32, 64, 128, 256, 512),
        description="sizes of the anchors in pixels, from the finest level on",
    )
    rois: int = Field(512, gt=0, description="proposals per image that the heads are trained on")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="number format, as train.precision of a run"
    )
    save_every: int = Field(1000, gt=0, description="steps between saved states")
    workers: int = Field(4, ge=1, description="threads per process that decode images")
    seed: int = Field(
        0, ge=0, lt=2**32, description="seed of the order, the flips, the sizes and the new layers"
    )


class RetrievalOptions(TaskOptions):
    """Options of the task `retrieval`."""

    protocol: Literal["auto", "copydays", "classes"] = Field(
        "auto", description="auto means copydays if the data has a folder `original`, else classes"
    )
    copies: str = Field("strong", min_length=1, description="CopyDays: folder with the copies")
    map: str = Field(
        "avgpool", description="feature map; gem (power 3) and rmac (3 levels) are also possible"
    )
    size: int = Field(224, gt=0, description="side of the centre crop in pixels")


OPTIONS: dict[str, type[TaskOptions]] = {
    "knn": KnnOptions,
    "linear": LinearOptions,
    "lowshot": LowshotOptions,
    "finetune": FinetuneOptions,
    "svm": SvmOptions,
    "transfer": TransferOptions,
    "detect": DetectOptions,
    "retrieval": RetrievalOptions,
}
