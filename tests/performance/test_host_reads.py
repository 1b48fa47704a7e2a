"""A step reads the device once: its metrics. On a CPU reads are counted, on a GPU waits."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from harness.jobs import ROOT, arguments, open_trainer, write_images
from harness.pool import Distributed
from seer_scale.train.trainer import Trainer

READS = {"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"}
# Operators whose result the host has to know (a number, or a shape that depends on values), and
# the one that makes a tensor of the host's numbers, which then has to be brought over.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique", "_unique2"}
MAKES = {"lift_fresh"}


class ByPython(TorchFunctionMode):
    """Counts tensors that Python reads."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in READS:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class ByTorch(TorchDispatchMode):
    """Counts tensors that torch itself reads, or makes of what the host holds."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in WAITS | MAKES:
            self.found[name] += 1
        if name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.found["boolean index"] += 1
        return func(*args, **(kwargs or {}))


def opened(argv: list[str], device: torch.device | None = None) -> Trainer:
    """The trainer of a job in which no step is skipped, since a skipped step reads less.

    Whether float16 overflows at the first loss scale, 2**16, depends on the processor's rounding.
    At a scale of 1 the largest float16 number of these steps is 12, and float16 ends at 65504.
    """
    trainer = open_trainer(argv, device)
    if trainer.engine.loss_scale:
        trainer.engine.loss_scale.value = 1.0
    return trainer


def reads_of_a_step(argv: list[str]) -> dict[str, int]:
    trainer = opened(argv)
    found: Counter[str] = Counter()
    try:
        for _ in range(2):  # constants are made in the first, a queue is full after the second
            trainer.train_step()
        with ByPython(found), ByTorch(found):
            trainer.train_step()
        assert not trainer.engine.loss_scale or not trainer.engine.loss_scale.overflowed
    finally:
        trainer.close("FINISHED")
    return dict(found)


# `lift_fresh`: what the ranks tell each other with the metrics, made on the host, and each tensor
# of a micro-batch that arrives from the loader: crops of a resolution, and their parameters where
# the device augments. On a CPU, and there alone, the optimizer asks whether the step is skipped: a
# GPU decides by itself.
ONE = {"tolist": 1, "lift_fresh": 2, "__bool__": 1, "_local_scalar_dense": 1}
ZERO2 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json")]


@pytest.mark.parametrize(
    ("more", "world_size", "expected"),
    [
        # The guard keeps the queue's two counters, which stay on the host.
        (
            ["objective.queue_length=16", "train.gradient_accumulation=2"],
            2,
            {**ONE, "lift_fresh": 5},
        ),
        (["objective.name=simclr", "sharding.activation_checkpointing=full"], 2, ONE),
        (["sharding.strategy=fsdp"], 2, ONE),
        (["optim.larc=false", "data.augment_on=device"], 1, {**ONE, "lift_fresh": 3}),
        # The loss scale asks whether the gradient is finite before the step.
        (["train.precision=amp-o1"], 1, {**ONE, "__bool__": 2, "_local_scalar_dense": 2}),
    ],
)
def test_a_step_reads_once(
    distributed: Distributed,
    tmp_path: Path,
    more: list[str],
    world_size: int,
    expected: dict[str, int],
) -> None:
    images = write_images(tmp_path / "images")
    # Images are made in another process, as in any run but the smallest.
    argv = arguments(
        images, tmp_path / "run", "data.workers=1", "optim.freeze_prototypes_steps=0", *more
    )
    found = distributed(reads_of_a_step, world_size, argv)
    assert found == [expected] * world_size


def reads() -> dict[str, int]:
    """Each way to wait for a device, once."""
    found: Counter[str] = Counter()
    values = torch.arange(3.0)
    with ByPython(found), ByTorch(found):
        values.sum().item()
        float(values[0])
        bool(values[0] > 1)
        values.tolist()
        values[[0, 2]]
        values[values > 1]
        values.nonzero()
        values.new_tensor([1.0])
        torch.tensor(1.0)
    return dict(found)


def test_the_counters_see_what_they_are_for() -> None:
    assert reads() == {
        "item": 1,
        "__float__": 1,
        "__bool__": 1,
        "tolist": 1,
        "_local_scalar_dense": 3,
        "boolean index": 1,
        "nonzero": 1,
        "lift_fresh": 3,
    }


def waits_on_a_gpu(argv: list[str]) -> list[str]:
    trainer = opened(argv, torch.device("cuda", 0))
    try:
        for _ in range(3):
            trainer.train_step()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                trainer.train_step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    finally:
        trainer.close("FINISHED")
    return [str(w.message) for w in caught if "synchronizing CUDA operation" in str(w.message)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts waits for a GPU: needs one")
@pytest.mark.parametrize(
    ("more", "most"),
    [
        ([], 1),
        (["train.precision=bf16"], 1),
        (["data.augment_on=device"], 1),
        (["objective.queue_length=16"], 1),
        (["sharding.activation_checkpointing=full"], 1),
        (["train.precision=amp-o1"], 2),
    ],
)
def test_a_step_waits_for_the_gpu_once(
    distributed: Distributed, tmp_path: Path, more: list[str], most: int
) -> None:
    images = write_images(tmp_path / "images")
    argv = arguments(images, tmp_path / "run", "data.workers=1", *more)
    (found,) = distributed(waits_on_a_gpu, 1, argv)
    assert len(found) <= most, found
