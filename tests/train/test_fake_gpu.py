"""A step of every strategy on a GPU that does not exist, as one of 64 ranks that do not either.

Not faked, because it is C++ that needs memory, or another project's: the reducer of torch's DDP
(here every rank keeps its own gradient), DeepSpeed, FairScale, Apex and torch.compile.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from harness.fake_gpu import GPU, fake_gpu
from harness.fake_ranks import fake_ranks
from harness.jobs import arguments, open_trainer, write_images
from seer_scale.train.trainer import Trainer

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.version.cuda is None, reason="asks for CUDA's kernels: CUDA's build"),
]

RANKS, STEPS = 64, 3
TOTALS, SCALE = ("step_totals.py", "over_ranks"), ("slice_sgd.py", "_whole_norms")
ALLOWED = {TOTALS: 0.0, SCALE: 1.0}  # the second: of a loss scale, whether gradients are finite

CASES: dict[str, tuple[str, ...]] = {
    "ddp": ("strategy=ddp", "format=channels_last"),
    "ddp, bf16, recomputed": ("strategy=ddp", "precision=bf16", "recompute=full"),
    "ddp, float16, augmented on the device": ("strategy=ddp", "precision=amp-o1", "augment=device"),
    "one rank, in the backward pass, momentum on the host": (
        *("ranks=1", "strategy=ddp", "fuse=true", "optim.momentum_on_host=true", "align=8"),
    ),
    "ddp, SimCLR": ("strategy=ddp", "objective.name=simclr", "accumulation=2"),
    "ddp, without LARC, spikes skipped": (
        *("strategy=ddp", "optim.larc=false", "train.on_spike=skip", "precision=bf16"),
    ),
    "fsdp": ("strategy=fsdp", "format=channels_last", "augment=device"),
    "fsdp, bf16, queue": ("strategy=fsdp", "precision=bf16", "queue=128", "accumulation=2"),
    "fsdp, float16, recomputed": ("strategy=fsdp", "precision=amp-o1", "recompute=full"),
    "fsdp, in the backward pass": (
        *("strategy=fsdp", "fuse=true", "precision=bf16", "align=8", "recompute=full"),
    ),
    "fsdp, weights stay whole": (
        *("strategy=fsdp", "sharding.reshard_after_forward=false", "objective.name=simclr"),
    ),
    "fsdp, groups of one rank": ("strategy=fsdp", "sharding.sync_bn_group_size=1", "align=8"),
    "hsdp": ("strategy=hsdp", "sharding.shard_size=8", "precision=bf16", "format=channels_last"),
    "hsdp, SimCLR, recomputed": (
        *("strategy=hsdp", "objective.name=simclr", "recompute=full", "augment=device"),
        *("accumulation=2", "align=8", "sharding.sync_bn_group_size=-1"),
    ),
}  # fmt: skip
KEYS = {
    "strategy": "sharding.strategy",
    "precision": "train.precision",
    "format": "train.memory_format",
    "recompute": "sharding.activation_checkpointing",
    "augment": "data.augment_on",
    "fuse": "optim.fuse_backward",
    "accumulation": "train.gradient_accumulation",
    "align": "model.align_channels",
    "queue": "objective.queue_length",
}

Mistake = Callable[[Trainer, Tensor], Tensor]


def steps(
    folder: Path, options: tuple[str, ...], mistake: Mistake | None = None
) -> Counter[tuple[str, str]]:
    """Takes steps as the trainer does; returns how often each place has read a value."""
    given = dict(option.split("=", 1) for option in options)
    ranks = int(given.pop("ranks", RANKS))
    more = [f"{KEYS.get(key, key)}={value}" for key, value in given.items()]
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE=str(min(ranks, 8)))
    argv = arguments(
        *(folder / "images", tempfile.mkdtemp(dir=folder), "data.workers=0", "data.prefetch=1"),
        *("model.head_batch_norm=true", "optim.freeze_prototypes_steps=1", *more),
    )
    ddp = patch("seer_scale.parallel.engine.wrap_ddp", lambda model, _: model)
    with fake_ranks(ranks, 0), fake_gpu(ALLOWED) as mode, ddp:
        trainer = open_trainer(argv, GPU)
        try:
            if mistake:
                trainer.objective = Mistaken(trainer, mistake)
            mode.stepping = True
            for _ in range(STEPS):
                trainer.train_step()
        finally:
            trainer.close("FINISHED")
    return mode.reads


def told(*arguments: Any) -> Counter[tuple[str, str]]:
    """Runs `steps`; torch's own errors do not survive the way to another process."""
    try:
        return steps(*arguments)
    except Exception:
        raise AssertionError(traceback.format_exc()) from None


class Mistaken:
    """An objective with a mistake after its loss."""

    def __init__(self, trainer: Trainer, mistake: Mistake) -> None:
        self.trainer, self.real, self.mistake = trainer, trainer.objective, mistake

    def __call__(self, embeddings: Tensor, scores: Tensor) -> tuple[Tensor, Any]:
        loss, metrics = self.real(embeddings, scores)
        return self.mistake(self.trainer, loss), metrics


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Runs `steps` in a process that nothing else uses, because torch is changed in it."""
    folder = tmp_path_factory.mktemp("fake_gpu")
    write_images(folder / "images")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield lambda *arguments: pool.submit(told, folder, *arguments).result()


@pytest.mark.parametrize("case", CASES)
def test_a_step_runs_on_a_gpu_and_reads_once(elsewhere: Callable[..., Any], case: str) -> None:
    expected = {TOTALS: STEPS}
    if "precision=amp-o1" in CASES[case]:
        expected[SCALE] = STEPS
    assert elsewhere(CASES[case]) == expected


def reads_a_number(_: Trainer, loss: Tensor) -> Tensor:
    return loss * loss.item()


def asks_a_question(_: Trainer, loss: Tensor) -> Tensor:
    return loss if loss > 0 else -loss


def reads_a_list(_: Trainer, loss: Tensor) -> Tensor:
    return loss * float(sum(loss[None].tolist()))


def chooses_by_value(_: Trainer, loss: Tensor) -> Tensor:
    return loss[None][loss[None] > 0].sum()


def leaves_a_tensor_on_the_host(_: Trainer, loss: Tensor) -> Tensor:
    return (loss * torch.ones(2)).sum()


def gives_a_kernel_two_devices(_: Trainer, loss: Tensor) -> Tensor:
    one = torch.zeros(3, device=loss.device)
    settings: dict[str, Any] = dict.fromkeys(("lr", "momentum", "weight_decay", "dampening"), 0.0)
    settings |= dict.fromkeys(("nesterov", "maximize", "is_first_step"), False)
    torch._fused_sgd_([one], [one.clone()], [], **settings, found_inf=torch.zeros(()))
    return loss


def waits(_: Trainer, loss: Tensor) -> Tensor:
    torch.cuda.synchronize()
    return loss


def reduces_on_the_host(_: Trainer, loss: Tensor) -> Tensor:
    torch.distributed.all_reduce(torch.ones(1))
    return loss


def needs_a_cpu(_: Trainer, loss: Tensor) -> Tensor:
    return loss[None].to_mkldnn().to_dense()[0]


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        (reads_a_number, "aten._local_scalar_dense.default"),
        (asks_a_question, "aten._local_scalar_dense.default"),
        (reads_a_list, "aten._local_scalar_dense.default"),
        (chooses_by_value, "aten.nonzero.default"),
        (leaves_a_tensor_on_the_host, "Expected all tensors to be on the same device"),
        (gives_a_kernel_two_devices, "_fused_sgd_.default got tensors of "),
        (waits, "the host waits for the GPU"),
        (reduces_on_the_host, "NCCL takes tensors on GPUs only"),
        (needs_a_cpu, "aten::to_mkldnn has no kernel for CUDA"),
    ],
)
def test_a_mistake_is_seen(elsewhere: Callable[..., Any], mistake: Mistake, error: str) -> None:
    with pytest.raises(AssertionError, match=error):
        elsewhere(CASES["ddp"], mistake)
