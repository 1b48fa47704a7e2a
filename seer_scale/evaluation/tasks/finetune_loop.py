"""The training behind `finetune`: epochs over one engine, a checkpoint after each, a test."""

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
from seer_scale.config import RunConfig
from seer_scale.config.ds_config import load_ds_config, resolve_ds_config
from seer_scale.errors import CheckpointError, UserError
from seer_scale.evaluation.augment_labelled import MiddleCrop, TrainCrop, batches, epoch_order
from seer_scale.evaluation.datasets.labelled import LabelledData
from seer_scale.evaluation.task import Context
from seer_scale.evaluation.tasks.finetune_options import Options, learning_rate
from seer_scale.models import build_classifier, seeded_values
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.optim.slices import Values
from seer_scale.parallel.engine import shard
from seer_scale.storage.tensor_file import write_tensors

CLASSIFIER = "classifier.safetensors"
_CHECKPOINTS = "checkpoints"


class FineTuning:
    """One rank's part of a fine-tuning; goes on from the newest checkpoint in the folder.

    Args:
        context: whose trunk is the start; it is moved to the host.
        options: which `finetune.check` has passed.
        data: the images.
    """

    def __init__(self, context: Context, options: Options, data: LabelledData) -> None:
        self._context, self._options, self._data = context, options, data
        self._steps_per_epoch = len(data.train) // options.batch
        self._about = {
            "options": options.model_dump(mode="json", exclude={"workers", "test_every"}),
            "model": context.model,
            "data": context.data,
            "classes": data.classes,
        }
        self.losses: list[float] = []  # mean of every epoch
        reader = self._reader()
        config = self._run_config()
        ds_config, path = None, options.deepspeed_config
        if path is not None:
            ds_config = resolve_ds_config(
                load_ds_config(path),
                path=path,
                config=config,
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
            config,
            ds_config,
            context.device,
        )
        self._without_decay()
        if reader:
            reader.fill_momentum(self._engine.slices())
            self.losses = list(reader.manifest["state"]["losses"])
            scale = reader.manifest["state"]["loss_scale"]
            if self._engine.loss_scale and scale:
                self._engine.loss_scale.load(scale)
            context.say(f"going on after epoch {len(self.losses)} of {reader.folder}")
        self._saver = Saver(context.folder / _CHECKPOINTS, trunk=context.trunk_name, keep=1)

    # ------------------------------------------------------------------------------- training

    def train(self) -> None:
        """The epochs that are left.

        Raises:
            CheckpointError: if the last checkpoint could not be written.
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
        # [steps * accumulate, world, micro]: of each global micro-batch a rank takes its rows.
        mine = used.reshape(-1, world, self._micro)[:, rank].tolist()
        parts = ([(place, epoch * len(images) + place) for place in part] for part in mine)
        return batches(images, parts, crop, workers=options.workers)

    def _save(self, *, last: bool) -> None:
        scale = self._engine.loss_scale
        self._saver.save(
            step=len(self.losses),
            slices=self._engine.slices(),
            writes_slices=self._engine.writes_slices,
            model=self._engine.model,
            local_state={},
            manifest={
                "state": {"losses": self.losses, "loss_scale": scale and scale.state()},
                "finetune": self._about,
            },
            urgent=last,
        )

    # ------------------------------------------------------------------------------- results

    @torch.no_grad()
    def test(self) -> Tensor:
        """Images, hits and hits among the best five, by class: int64 [3, classes].

        Each image is judged by one rank, once; the sums are the same on every rank.
        """
        options, images, engine = self._options, self._data.val, self._engine
        size = options.test_size or options.size
        crop = MiddleCrop(size, options.test_resize or round(size * 8 / 7), options.bicubic)
        world, rank = distributed.world_size(), distributed.rank()
        sums = torch.zeros(3, len(self._data.classes), dtype=torch.int64)
        rounds = -(-len(images) // (world * self._micro))
        mine = np.array_split(np.arange(rank, len(images), world), rounds)
        parts = ([(int(place), 0) for place in part] for part in mine if len(part))
        stream = batches(images, parts, crop, workers=options.workers)
        engine.model.eval()
        for part in mine:
            if not len(part):
                # A sharded model gathers its weights together: this rank has to come along.
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
        """Writes the trunk and the classifier from the last checkpoint, on rank 0."""
        if distributed.is_main():
            folder = self._context.folder
            checkpoint = list_checkpoints(folder / _CHECKPOINTS)[-1]
            fresh = folder / "trunk.writing"
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.copytree(checkpoint / "trunk", fresh)
            shutil.rmtree(folder / "trunk", ignore_errors=True)
            fresh.rename(folder / "trunk")
            reader = CheckpointReader(checkpoint)
            kinds = {name: reader.kinds[f"head.{name}"] for name in ("weight", "bias")}
            write_tensors(
                folder / CLASSIFIER,
                kinds,
                lambda name: reader.whole(f"head.{name}"),
                {"trunk": self._context.trunk_name, "classes": json.dumps(self._data.classes)},
            )
        distributed.barrier()

    # ------------------------------------------------------------------------------- building

    @property
    def _micro(self) -> int:
        """Images per rank and forward pass."""
        return self._options.batch // (distributed.world_size() * self._options.accumulate)

    def _reader(self) -> CheckpointReader | None:
        root: Path = self._context.folder / _CHECKPOINTS
        saved = first_whole(list_checkpoints(root)[::-1], self._context.say)
        if saved and saved.manifest.get("finetune") != self._about:
            raise UserError(
                f"{self._context.folder} holds a fine-tuning with other options, or of another "
                "model or data: choose another folder, or remove this one"
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
        """BatchNorm's weights are not decayed (VISSL's regularize_bn is off in fine-tuning)."""
        norms = {
            f"{prefix}.{name}"
            for prefix, module in self._engine.model.named_modules()
            if hasattr(module, "running_var")
            for name in ("weight", "bias")
        }
        for group in self._engine.param_groups:
            if group["name"] in norms:
                group["weight_decay"] = 0.0

    def _run_config(self) -> RunConfig:
        """What `shard` reads; the sections it does not read hold the least that is valid."""
        options = self._options
        return RunConfig.model_validate(
            {
                "recipe": "finetune",
                "run": {"dir": str(self._context.folder), "seed": options.seed},
                "train": {
                    "steps": options.epochs * self._steps_per_epoch,
                    "micro_batch_size": self._micro,
                    "gradient_accumulation": options.accumulate,
                    "precision": options.precision,
                },
                "model": {"trunk": self._context.trunk_name, "head_dims": [1], "prototypes": 2},
                "objective": {},
                "optim": {
                    "momentum": options.momentum,
                    "nesterov": options.nesterov,
                    "weight_decay": options.weight_decay,
                    "larc": False,
                },
                "sharding": {
                    "strategy": options.strategy,
                    "deepspeed_config": options.deepspeed_config,
                    "activation_checkpointing": options.activation_checkpointing,
                },
                "data": {"path": "-", "crop_sizes": [options.size], "crop_counts": [2]},
                "checkpoint": {},
                "tracking": {"enabled": False},
            }
        )
