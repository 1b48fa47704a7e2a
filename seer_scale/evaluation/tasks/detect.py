"""Object detection: Mask R-CNN with a feature pyramid on the trunk, on COCO-format data.

The defaults are VISSL's for SEER: Detectron2's 1x schedule with SyncBatchNorm. Every process holds
the whole detector; gradients are averaged over the processes.
"""

from __future__ import annotations

import json
import math
from typing import cast

import torch
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.errors import CheckpointError, UserError
from seer_scale.evaluation.datasets.coco import CocoPart, open_coco
from seer_scale.evaluation.detect_batches import training_batches
from seer_scale.evaluation.detect_score import average_precision, detect
from seer_scale.evaluation.detector import build_detector, train_mode
from seer_scale.evaluation.options import DetectOptions
from seer_scale.evaluation.sgd_state import load_state, save_state, sgd_state
from seer_scale.evaluation.task import Context, Result
from seer_scale.models.regnet import RegNet
from seer_scale.parallel.torch_engine import wrap_ddp
from seer_scale.storage.tensor_file import TensorFile

STATE = "detector.safetensors"
_SAID_EVERY = 100  # iterations between two lines of progress
_WARMUP_START = 1e-3  # share of the learning rate at the first iteration, as in Detectron2

Options = DetectOptions


def run(context: Context, options: Options) -> Result:
    """Trains a detector on the context's trunk and judges it on the validation part.

    The state is saved to `context.folder/detector.safetensors`. A run that was killed resumes from
    it; at the end it holds the trained detector.

    Raises:
        UserError: an option does not fit, pycocotools is missing, or the folder holds a detector
            of other options.
        CheckpointError: the saved state is damaged.
        DataError: annotations or images are missing or wrong.
    """
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
        "train_images": len(train.with_objects),
        "test_images": len(val.pictures),
        "detections": len(found),
        "box_ap_per_category": by_category,
    }
    return Result(box | mask, details)


def learning_rate(options: Options, iteration: int) -> float:
    """Returns the learning rate of an iteration, counted from 0."""
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
        self._data = data
        torch.manual_seed(options.seed)  # for the new layers
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
        self._optimizer = torch.optim.SGD(
            [parameter for parameter in self.detector.parameters() if parameter.requires_grad],
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
        """Trains for the iterations that are left."""
        options, device = self._options, self._context.device
        alone = distributed.world_size() == 1
        module = self.detector if alone else wrap_ddp(self.detector, device)
        train_mode(self.detector)
        stream = training_batches(
            self._data,
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
        """Takes one step; returns the mean loss over the ranks."""
        options, device = self._options, self._context.device
        # A resumed run must draw the same sizes and proposals, which come from torch's generator.
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
                f"the loss of iteration {iteration + 1} is {mean}: training stops and keeps the "
                "last saved state; try a lower lr, a longer warmup or precision=fp32"
            )
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return mean

    # ------------------------------------------------------------------------------- state

    def _save(self) -> None:
        if distributed.is_main():
            about = {"iterations": str(self._done), "about": json.dumps(self._about)}
            save_state(self._context.folder / STATE, self._tensors(), about)
        distributed.barrier()

    def _load(self) -> int:
        """Loads the state that an earlier run saved; returns the iterations that are done."""
        path = self._context.folder / STATE
        if not distributed.broadcast_object(path.is_file()):
            return 0
        try:
            file = TensorFile(path)
            about, done = json.loads(file.metadata["about"]), int(file.metadata["iterations"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}): remove it to start again"
            ) from None
        if about != self._about:
            raise UserError(
                f"{path} is a detector of other options, another model or other data: choose "
                "another folder, or remove the file"
            )
        load_state(file, self._tensors())
        self._context.say(f"resumed after iteration {done}")
        return done

    def _tensors(self) -> dict[str, Tensor]:
        return sgd_state(self.detector, self._optimizer, weights="model/", momenta="momentum/")
