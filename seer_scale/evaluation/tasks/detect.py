"""Object detection: Mask R-CNN with a feature pyramid on the trunk, on COCO-format data.

Defaults are VISSL's for SEER (Detectron2's 1x schedule with SyncBatchNorm). Every process holds the
whole detector; gradients are averaged.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.errors import CheckpointError, UserError
from seer_scale.evaluation.datasets.coco import CocoPart, need_pycocotools, open_coco
from seer_scale.evaluation.detect_batches import training_batches
from seer_scale.evaluation.detect_score import average_precision, detect
from seer_scale.evaluation.detector import build_detector, train_mode
from seer_scale.evaluation.task import Context, Result, TaskOptions
from seer_scale.models.regnet import RegNet
from seer_scale.parallel.torch_engine import wrap_ddp
from seer_scale.storage.tensor_file import Kind, TensorFile, write_tensors

STATE = "detector.safetensors"
_SAID_EVERY = 100  # iterations between two lines
_WARMUP_START = 1e-3  # share of the learning rate at the first iteration, as in Detectron2

Numbers = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(min_length=1)]


class Options(TaskOptions):
    """Of `detect`."""

    iterations: int = Field(90_000, gt=0, description="steps of the optimizer")
    batch: int = Field(16, gt=0, description="images per step, over all processes")
    lr: float = Field(0.02, gt=0, description="learning rate")
    lr_steps: Numbers = Field((60_000, 80_000), description="steps after which it falls")
    lr_gamma: float = Field(0.1, gt=0, le=1, description="factor by which it falls")
    warmup: int = Field(100, ge=0, description="steps of its linear rise")
    momentum: float = Field(0.9, ge=0, lt=1, description="of SGD")
    weight_decay: float = Field(1e-4, ge=0, description="on every tensor that is trained")
    batch_norm: Literal["frozen", "sync"] = Field(
        "sync", description="over all processes, in the pyramid too; or the trunk's as it is"
    )
    masks: bool = Field(True, description="Mask R-CNN; false: Faster R-CNN, boxes only")
    min_sizes: Numbers = Field(
        (640, 672, 704, 736, 768, 800),
        description="shorter sides of training images in pixels; the last is a test image's",
    )
    max_size: int = Field(1333, gt=0, description="most that a longer side may have")
    channels: int = Field(256, gt=0, description="of pyramid and mask head; the box head has 4x")
    anchors: Numbers = Field(
        (32, 64, 128, 256, 512), description="sizes in pixels, from the finest level on"
    )
    rois: int = Field(512, gt=0, description="proposals per image that the heads train on")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="as train.precision")
    save_every: int = Field(1000, gt=0, description="steps between two saved states")
    workers: int = Field(4, ge=1, description="threads per process that decode images")
    seed: int = Field(0, ge=0, lt=2**32, description="of order, flips, sizes and new layers")


def run(context: Context, options: Options) -> Result:
    """Trains a detector on the context's trunk and judges it on the validation part.

    The state is saved to `context.folder/detector.safetensors`, which a run that was ended goes on
    from; at the end it is the trained detector.

    Raises:
        UserError: if an option does not fit, or the folder holds another detector.
        DataError: if annotations or images are not as they should be.
    """
    need_pycocotools()
    train, val = open_coco(context.data, masks=options.masks)
    _check(context, options)
    job = _Training(context, options, train)
    job.run()
    found = detect(job.detector, val, context.device)
    box, by_category = average_precision(val, found, "bbox")
    mask: dict[str, float] = {}
    if options.masks:
        mask, _ = average_precision(val, found, "segm")
    details = {
        "options": options.model_dump(mode="json"),
        "train_images": len(job.pictures),
        "test_images": len(val.pictures),
        "detections": len(found),
        "box_ap_per_category": by_category,
    }
    return Result(box | mask, details)


def learning_rate(options: Options, iteration: int) -> float:
    """Of an iteration, counted from 0."""
    rate = options.lr * options.lr_gamma ** sum(iteration >= end for end in options.lr_steps)
    if iteration < options.warmup:
        done = iteration / options.warmup
        rate *= _WARMUP_START * (1 - done) + done
    return rate


def _check(context: Context, options: Options) -> None:
    world = distributed.world_size()
    if options.batch % world:
        raise UserError(
            f"batch={options.batch} cannot be split evenly over {world} processes: choose a "
            f"multiple of {world}"
        )
    levels = len(_trunk(context).stages()) + 1
    if len(options.anchors) < levels:
        raise UserError(
            f"anchors={list(options.anchors)}, but {context.trunk_name} needs {levels}: one per "
            "stage, and one for the pooled level"
        )


def _trunk(context: Context) -> RegNet:
    return cast(RegNet, context.trunk)


class _Training:
    """One rank's part of the training."""

    def __init__(self, context: Context, options: Options, data: CocoPart) -> None:
        self._context, self._options = context, options
        self.pictures = [picture for picture in data.pictures if picture.singles]
        torch.manual_seed(options.seed)  # of the new layers
        self.detector = build_detector(
            _trunk(context),
            classes=len(data.categories),
            masks=options.masks,
            sync=options.batch_norm == "sync",
            channels=options.channels,
            anchors=options.anchors,
            rois=options.rois,
            min_sizes=options.min_sizes,
            max_size=options.max_size,
        ).to(context.device)
        self._trained = {
            name: parameter
            for name, parameter in self.detector.named_parameters()
            if parameter.requires_grad
        }
        self._optimizer = torch.optim.SGD(
            self._trained.values(),
            lr=options.lr,
            momentum=options.momentum,
            weight_decay=options.weight_decay,
        )
        self._about = {
            "options": options.model_dump(mode="json", exclude={"workers", "save_every"}),
            "model": context.model,
            "data": context.data,
            "categories": data.names,
        }
        self._done = self._load()

    def run(self) -> None:
        """The iterations that are left."""
        options, device = self._options, self._context.device
        alone = distributed.world_size() == 1
        module = self.detector if alone else wrap_ddp(self.detector, device)
        train_mode(self.detector)
        stream = training_batches(
            self.pictures,
            batch=options.batch,
            first=self._done,
            seed=options.seed,
            masks=options.masks,
            workers=options.workers,
        )
        for iteration in range(self._done, options.iterations):
            samples = [
                (image.to(device), {name: x.to(device) for name, x in target.items()})
                for image, target in next(stream)
            ]
            loss = self._step(module, samples, iteration)
            if (iteration + 1) % _SAID_EVERY == 0:
                self._context.say(f"iteration {iteration + 1} of {options.iterations}: {loss:.4f}")
            self._done = iteration + 1
            if self._done % options.save_every == 0 or self._done == options.iterations:
                self._save()
        stream.close()  # type: ignore[attr-defined]

    def _step(
        self, module: nn.Module, samples: list[tuple[Tensor, dict[str, Tensor]]], iteration: int
    ) -> float:
        """One step; the mean of the loss over the ranks."""
        options, device = self._options, self._context.device
        # torchvision draws sizes and proposals from torch's generator; a resumed run does alike.
        world, rank = distributed.world_size(), distributed.rank()
        torch.manual_seed((options.seed << 32) + iteration * world + rank)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(options, iteration)
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            losses = module([image for image, _ in samples], [target for _, target in samples])
            loss = torch.stack([value.float() for value in losses.values()]).sum()
        mean = float(distributed.all_reduce(loss.detach().clone())) / world
        if not math.isfinite(mean):
            raise UserError(
                f"the loss of iteration {iteration + 1} is {mean}: training stops, its last saved "
                "state stays; try a lower lr, a longer warmup or precision=fp32"
            )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return mean

    # ------------------------------------------------------------------------------- state

    def _save(self) -> None:
        if distributed.is_main():
            tensors = self._tensors()
            path = self._context.folder / STATE
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(".writing")
            write_tensors(
                fresh,
                {name: Kind.of(tensor) for name, tensor in tensors.items()},
                lambda name: tensors[name].detach().cpu().contiguous(),
                {"iterations": str(self._done), "about": json.dumps(self._about)},
            )
            fresh.replace(path)
        distributed.barrier()

    def _load(self) -> int:
        """Takes over what an earlier run saved; the number of its iterations."""
        path = self._context.folder / STATE
        if not distributed.broadcast_object(path.is_file()):
            return 0
        try:
            file = TensorFile(path)
            about, done = json.loads(file.metadata["about"]), int(file.metadata["iterations"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}): remove it to start anew") from None
        if about != self._about:
            raise UserError(
                f"{path} is a detector of other options, or of another model or data: choose "
                "another folder, or remove it"
            )
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(file.whole(name))
        self._context.say(f"going on after iteration {done}")
        return done

    def _tensors(self) -> dict[str, Tensor]:
        """All that is saved: parameters and buffers, and the optimizer's momentum."""
        tensors = {f"model/{name}": x for name, x in self.detector.state_dict().items()}
        for name, parameter in self._trained.items():
            state: dict[str, Any] = self._optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            tensors[f"momentum/{name}"] = state["momentum_buffer"]
        return tensors
