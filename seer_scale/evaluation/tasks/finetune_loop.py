"""Training of the task `finetune`: epochs on one engine, a checkpoint after each, and a test."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader, Saver, first_whole, list_checkpoints
from seer_scale.config.ds_config import load_ds_config, resolve_ds_config
from seer_scale.data.middle_crop import MiddleCrop
from seer_scale.errors import CheckpointError, UserError
from seer_scale.evaluation.datasets.labelled import LabelledData
from seer_scale.evaluation.labelled_crops import TrainCrop, crop_batches
from seer_scale.evaluation.options import FinetuneOptions
from seer_scale.evaluation.task import Context
from seer_scale.evaluation.tasks.finetune_schedule import epoch_order, learning_rate
from seer_scale.models import build_classifier, seeded_values
from seer_scale.optim.options import OptimizerOptions
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.optim.slices import Values
from seer_scale.parallel.engine import shard
from seer_scale.parallel.options import ShardingOptions
from seer_scale.storage.atomic import replaced_folder
from seer_scale.storage.tensor_file import write_tensors

CLASSIFIER = "classifier.safetensors"
_CHECKPOINTS = "checkpoints"


class FineTuning:
    """One rank's part of a fine-tuning; resumes from the newest checkpoint in the folder.

    Args:
        context: context with the trunk to start from, which is moved to the host.
        options: options that `finetune_schedule.check` has accepted.
        data: images to train on and to test on.

    Raises:
        UserError: the folder holds a fine-tuning with other options, model or data.
    """

    def __init__(self, context: Context, options: FinetuneOptions, data: LabelledData) -> None:
        self._context, self._options, self._data = context, options, data
        self._steps_per_epoch = len(data.train) // options.batch
        self._about = {
            "options": {
                **options.model_dump(mode="json", exclude={"workers", "test_every"}),
                "labels": context.labels,
            },
            "model": context.model,
            "data": context.data,
            "classes": data.classes,
        }
        self.losses: list[float] = []  # mean loss of every epoch
        reader = self._reader()
        ds_config, path = None, options.deepspeed_config
        if path is not None:
            ds_config = resolve_ds_config(
                load_ds_config(path),
                path=path,
                micro_batch_size=self._micro,
                gradient_accumulation=options.accumulate,
                world_size=distributed.world_size(),
            )
        self._engine = shard(
            lambda device: build_classifier(
                context.trunk_name,
                classes=len(data.classes),
                freeze=options.freeze,
                device=device,
            ),
            reader.values if reader else self._start_values,
            ShardingOptions(
                strategy=options.strategy,
                deepspeed_config=path,
                activation_checkpointing=options.activation_checkpointing,
                gradient_accumulation=options.accumulate,
            ),
            OptimizerOptions(
                momentum=options.momentum,
                nesterov=options.nesterov,
                weight_decay=options.weight_decay,
            ),
            precision=options.precision,
            device=context.device,
            ds_config=ds_config,
        )
        self._without_decay()
        if reader:
            reader.fill_momentum(self._engine.slices(), together=self._engine.holds_all)
            reader.close()
            self.losses = list(reader.manifest["state"]["losses"])
            scale = reader.manifest["state"]["loss_scale"]
            if self._engine.loss_scale and scale:
                self._engine.loss_scale.load(scale)
            context.say(f"resuming after epoch {len(self.losses)} of {reader.folder}")
        self._saver = Saver(context.folder / _CHECKPOINTS, trunk=context.trunk_name, keep=1)

    def train(self) -> None:
        """Trains the epochs that are left.

        Raises:
            CheckpointError: the last checkpoint could not be written.
            UserError: the mean loss of an epoch is not finite.
        """
        options = self._options
        while len(self.losses) < options.epochs:
            self.losses.append(self._train_epoch(len(self.losses)))
            epoch = len(self.losses)
            self._context.say(f"epoch {epoch} of {options.epochs}: loss {self.losses[-1]:.4f}")
            self._save(last=epoch == options.epochs)
            if options.test_every and epoch % options.test_every == 0 and epoch < options.epochs:
                counts, right, _ = self.test()
                share = int(right.sum()) / int(counts.sum())
                self._context.say(f"epoch {epoch} of {options.epochs}: top1 {share:.4f}")
        self._saver.wait()
        problem = None
        for outcome in self._saver.outcomes():
            problem = outcome.problem
        if problem := distributed.broadcast_object(problem):
            raise CheckpointError(f"the fine-tuned classifier was not written ({problem})")
        self._saver.close()

    def _train_epoch(self, epoch: int) -> float:
        options, engine = self._options, self._engine
        engine.model.train()
        frozen = engine.model.frozen()  # type: ignore[operator]
        stream = self._train_batches(epoch)
        total = torch.zeros((), dtype=torch.float64, device=self._context.device)
        for step in range(self._steps_per_epoch):
            rate = learning_rate(
                options, epoch * self._steps_per_epoch + step, self._steps_per_epoch
            )
            apply_schedule(engine.param_groups, lr=rate, frozen=frozen)
            for _ in range(options.accumulate):
                images, targets = next(stream)
                _, logits = engine([images.to(self._context.device)], None)
                loss = F.cross_entropy(logits, targets.to(self._context.device))
                engine.backward(loss)
                engine.step()
                total += loss.detach().double() / options.accumulate
        mean = float(distributed.all_reduce(total)) / distributed.world_size()
        mean /= self._steps_per_epoch
        if not math.isfinite(mean):
            raise UserError(
                f"the loss of epoch {epoch + 1} is {mean}: fine-tuning stops; try a lower base_lr, "
                "warmup_epochs=1 or precision=fp32"
            )
        return mean

    def _train_batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        options, images = self._options, self._data.train
        crop = TrainCrop(
            options.size,
            options.seed,
            colour_distortion=options.colour_distortion,
            blur=options.blur,
            bicubic=options.bicubic,
        )
        order = epoch_order(len(images), seed=options.seed, epoch=epoch)
        used = order[: self._steps_per_epoch * options.batch]
        world, rank = distributed.world_size(), distributed.rank()
        # [steps * accumulate, world, micro]: a rank takes its rows of each global micro-batch.
        mine = used.reshape(-1, world, self._micro)[:, rank].tolist()
        parts = ([(place, epoch * len(images) + place) for place in part] for part in mine)
        return crop_batches(images, parts, crop, workers=options.workers)

    def _save(self, *, last: bool) -> None:
        scale = self._engine.loss_scale
        self._saver.save(
            step=len(self.losses),
            slices=self._engine.written_slices(),
            model=self._engine.model,
            local_state={},
            manifest={
                "state": {"losses": list(self.losses), "loss_scale": scale and scale.state()},
                "finetune": self._about,
            },
            urgent=last,
        )

    @torch.no_grad()
    def test(self) -> Tensor:
        """Counts images, top-1 hits and top-5 hits by class: int64 [3, classes].

        One rank judges each image, once; the sums are the same on every rank.
        """
        options, images, engine = self._options, self._data.val, self._engine
        size = options.test_size or options.size
        crop = MiddleCrop(size, options.test_resize, options.bicubic)
        world, rank = distributed.world_size(), distributed.rank()
        sums = torch.zeros(3, len(self._data.classes), dtype=torch.int64)
        rounds = -(-len(images) // (world * self._micro))
        mine = np.array_split(np.arange(rank, len(images), world), rounds)
        parts = ([(int(place), 0) for place in part] for part in mine if len(part))
        stream = crop_batches(images, parts, crop, workers=options.workers)
        engine.model.eval()
        for part in mine:
            if not len(part):
                # All ranks gather the weights of a sharded model together, so this one must, too.
                engine([torch.zeros(1, 3, size, size, device=self._context.device)], None)
                continue
            pixels, targets = next(stream)
            _, logits = engine([pixels.to(self._context.device)], None)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices.cpu()  # [B, 5]
            hits = best == targets[:, None]
            for row, which in enumerate((torch.ones_like(targets), hits[:, 0], hits.any(1))):
                sums[row].scatter_add_(0, targets, which.to(torch.int64))
        engine.model.train()
        return distributed.all_reduce(sums.to(self._context.device)).cpu()

    def export(self) -> None:
        """Writes the trunk and the classifier of the last checkpoint, on rank 0."""
        if distributed.is_main():
            folder = self._context.folder
            checkpoint = list_checkpoints(folder / _CHECKPOINTS)[-1]
            with replaced_folder(folder / "trunk") as fresh:
                shutil.copytree(checkpoint / "trunk", fresh, dirs_exist_ok=True)
            reader = CheckpointReader(checkpoint)
            kinds = {name: reader.kinds[f"head.{name}"] for name in ("weight", "bias")}
            write_tensors(
                folder / CLASSIFIER,
                kinds,
                lambda name: reader.whole(f"head.{name}"),
                {"trunk": self._context.trunk_name, "classes": json.dumps(self._data.classes)},
            )
        distributed.barrier()

    @property
    def _micro(self) -> int:
        """Number of images per rank and forward pass."""
        return self._options.batch // (distributed.world_size() * self._options.accumulate)

    def _reader(self) -> CheckpointReader | None:
        root: Path = self._context.folder / _CHECKPOINTS
        saved = first_whole(list_checkpoints(root)[::-1], self._context.say)
        if saved and saved.manifest.get("finetune") != self._about:
            raise UserError(
                f"{self._context.folder} holds a fine-tuning with other options, or of another "
                "model or data: choose another folder with --out, or remove this one"
            )
        return saved

    def _start_values(self, model: nn.Module) -> Values:
        drawn = seeded_values(model, self._options.seed)
        state = self._context.trunk.cpu().state_dict()

        def values(name: str, start: int, stop: int) -> Tensor:
            if name.startswith("trunk."):
                whole: Tensor = state[name.removeprefix("trunk.")]
                return whole.reshape(-1)[start:stop]
            return drawn(name, start, stop)

        return values

    def _without_decay(self) -> None:
        """Sets the weight decay of BatchNorm to 0 (VISSL's fine-tuning has regularize_bn off)."""
        norms = {
            f"{prefix}.{name}"
            for prefix, module in self._engine.model.named_modules()
            if hasattr(module, "running_var")
            for name in ("weight", "bias")
        }
        for group in self._engine.param_groups:
            if group["name"] in norms:
                group["weight_decay"] = 0.0
