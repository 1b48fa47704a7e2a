"""What a rank's step really takes on this machine: resident memory, on two gloo processes."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.conftest import Pool

# Every tensor above 64 KiB is a mapping of its own, so that resident memory falls when one is
# freed; oneDNN keeps no converted weights. Set before the processes start.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SECONDS = 600.0
_REPLACED = ("train.micro_batch_size", "data.crop_sizes", "data.crop_counts", "model.trunk")


def measure(*arguments: str, ranks: int = 2) -> int:
    """Bytes that the most loaded rank takes at the peak of a third step, beside the interpreter.

    Args:
        arguments: of launch/pretrain.py.
        ranks: processes.
    """
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    pool = Pool(ranks)
    try:
        return max(pool.run(_measure, list(arguments), seconds=SECONDS))
    finally:
        pool.close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _measure(arguments: Sequence[str]) -> int:
    import torch.distributed as dist

    from benchmarks import memory
    from seer_scale.parallel import zero
    from seer_scale.recipe import parse

    small = ("train.micro_batch_size=2", "data.crop_sizes=[32]", "data.crop_counts=[2]")
    if "--deepspeed_config" in arguments:
        zero._deepspeed()
    # Libraries load and allocate on first use: that is the interpreter's, not the plan's.
    kept = [a for a in arguments if a.split("=")[0] not in _REPLACED]
    warm = parse(
        [*kept, "model.trunk=regnety_debug", *small],
        recipes=memory.record.ROOT / "launch" / "recipes",
    ).config
    engine: Any = memory.build_engine(warm)[0]
    _step(engine, warm)
    _step(engine, warm)
    if hasattr(engine, "_engine"):
        engine._engine.destroy()
    del engine
    _settle()
    baseline = _resident("VmRSS")

    config = parse(arguments, recipes=memory.record.ROOT / "launch" / "recipes").config
    engine = memory.build_engine(config)[0]
    for _ in range(2):  # DDP makes its buckets anew at the second
        _step(engine, config)
    _settle()
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts afresh
    _step(engine, config)
    return _resident("VmHWM") - baseline


def _step(engine: Any, config: Any) -> None:
    from benchmarks import memory

    memory.forward_and_backward(engine, config)
    engine.step()


def _settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status names no {key}: this needs Linux")
