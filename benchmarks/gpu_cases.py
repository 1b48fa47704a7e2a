"""Cases of `make gpu-check` beside the parity matrix, where a GPU's answer may differ from a CPU's.

Each runs on every rank of a process group, on the device that it is given, and returns what is
wrong, or None. A CPU runs the same code, so that its logic is tested without a GPU.
"""

from __future__ import annotations

import math
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness import parity
from seer_scale import distributed
from seer_scale.distributed import flight_recorder
from seer_scale.objectives.swav import SwAV
from seer_scale.optim.slice_sgd import apply_schedule
from seer_scale.parallel import batchnorm_gpu
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm
from seer_scale.parallel.convert_batchnorm import convert_sync_batchnorm
from seer_scale.performance.memory_snapshot import MemorySnapshot

MINUTES = 77.0  # the groups' timeout, which is no default of torch or DeepSpeed
ROWS, CHANNELS = 3, 5  # images of a rank in the cases of BatchNorm
LARGE = (2, 1024, 1024, 1032)  # more than 2**31 elements, so that 32 bits cannot number them
LARGE_GIB = 40.0  # for input, gradient, output and its gradient, 4 GiB each, and as many copies
# Share of the largest value, or of 1. Sums of float32 in another order, and values of 8 bits; the
# oracle is float64.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
LOCAL = ("weight gradient", "bias gradient")  # their sum over the ranks is the group's
# Shape of an image; formats of input and gradient.
LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format
LAYOUTS: dict[str, tuple[tuple[int, ...], torch.memory_format, torch.memory_format]] = {
    "contiguous": ((CHANNELS, 6, 4), CONTIGUOUS, CONTIGUOUS),
    "channels_last": ((CHANNELS, 6, 4), LAST, LAST),
    "channels_last, contiguous gradient": ((CHANNELS, 6, 4), LAST, CONTIGUOUS),
    "contiguous, channels_last gradient": ((CHANNELS, 6, 4), CONTIGUOUS, LAST),
    "1x1": ((CHANNELS, 1, 1), LAST, LAST),
    "[N, C]": ((CHANNELS,), CONTIGUOUS, CONTIGUOUS),
}
# Factor of the loss, and whether it is that of one rank alone.
KINDS = {
    "NaN loss": (math.nan, False),
    "NaN gradient on one rank": (math.nan, True),
    "infinite gradient on one rank": (math.inf, True),
}


def batchnorm(
    layout: str,
    group_size: int,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.float32,
    summed: bool = False,
) -> str | None:
    """Compares a synchronised layer with torch's own in float64 over the batch of its group.

    One rank alone is a group too if `group_size` is 0.

    Args:
        layout: key of `LAYOUTS`.
        group_size: see `sync_group`.
        device: this rank's device.
        dtype: type of input and gradient.
        summed: sum statistics even in a group that is small enough to gather them.
    """
    shape, of_input, of_gradient = LAYOUTS[layout]
    world, rank = distributed.world_size(), distributed.rank()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((2, world * ROWS, *shape), generator=generator) + 3
    x, grad = images.to(dtype).double()
    size = group_size or world
    first = rank // size * size
    members = slice(first * ROWS, min(first + size, world) * ROWS)
    expected = _run(_layer(torch.float64, len(shape)), x[members], grad[members])
    synced = _synced(_layer(torch.float32, len(shape)), group_size, device)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    parts = [part[mine].to(device, dtype) for part in (x, grad)]
    if len(shape) == 3:
        formats = (of_input, of_gradient)
        parts = [p.contiguous(memory_format=f) for p, f in zip(parts, formats, strict=True)]
    most = 0 if summed else batchnorm_gpu.MOST_GATHERED
    with patch.object(batchnorm_gpu, "MOST_GATHERED", most):
        found = _run(synced, parts[0], parts[1])
    for name in LOCAL:
        everyone = distributed.all_gather(found[name][None])
        found[name] = everyone[first : first + size].sum(0)
    inside = slice((rank - first) * ROWS, (rank - first + 1) * ROWS)
    wanted = {k: v[inside] if k in ("output", "gradient") else v for k, v in expected.items()}
    return "; ".join(_differences(found, wanted, dtype)) or None


def large_batchnorm(
    layout: str, device: torch.device, shape: tuple[int, int, int, int] = LARGE
) -> str | None:
    """Compares the first, middle and last channel of large bf16 tensors with torch in float64."""
    generator = torch.Generator(device).manual_seed(distributed.rank())
    x, grad = (
        torch.empty(shape, dtype=torch.bfloat16, device=device, memory_format=LAYOUTS[layout][1])
        for _ in range(2)
    )
    x.normal_(3, 1, generator=generator)
    grad.normal_(generator=generator).add_(x)  # so that no sum is near zero
    images, channels = shape[:2]
    found = _run(_synced(_layer(torch.float32, 3, channels), 0, device), x, grad)
    for name in LOCAL:
        found[name] = distributed.all_gather(found[name][None]).sum(0)
    mine = slice(distributed.rank() * images, (distributed.rank() + 1) * images)
    wrong = []
    for channel in (0, channels // 2, channels - 1):
        one = slice(channel, channel + 1)
        parts = [distributed.all_gather(part[:, one]).cpu().double() for part in (x, grad)]
        expected = _run(_layer(torch.float64, 3, channels, one), *parts)
        wanted = {k: v[mine] if v.dim() > 1 else v for k, v in expected.items()}
        own = {k: v[:, one] if v.dim() > 1 else v[one] for k, v in found.items()}
        wrong += [f"{w} in channel {channel}" for w in _differences(own, wanted, x.dtype)]
    return "; ".join(wrong) or None


def _layer(
    dtype: torch.dtype, dims: int, channels: int = CHANNELS, of: slice = slice(None)
) -> nn.Sequential:
    weight, bias = torch.linspace(0.5, 2, channels)[of], torch.linspace(-1, 1, channels)[of]
    norm = (nn.BatchNorm2d if dims == 3 else nn.BatchNorm1d)(len(weight), dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
        norm.bias.copy_(bias)
    return nn.Sequential(norm)


def _synced(model: nn.Sequential, group_size: int, device: torch.device) -> nn.Sequential:
    synced = convert_sync_batchnorm(model, group_size).to(device)
    alone = distributed.world_size() == 1 and group_size == 0
    if alone and isinstance(synced[0], GroupedSyncBatchNorm):
        synced[0].group = dist.group.WORLD
    return synced


def _differences(
    found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype
) -> list[str]:
    worst = {name: float((found[name].cpu() - value).abs().max()) for name, value in wanted.items()}
    return [
        f"{name} differs by {difference:.1e}"
        for name, difference in worst.items()
        if not difference <= TOLERANCE[dtype] * max(1.0, float(wanted[name].abs().max()))
    ]


def _run(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = model(x)
    names = ["gradient", *(f"{name[2:]} gradient" for name, _ in model.named_parameters())]
    gradients = torch.autograd.grad(y, [x, *model.parameters()], grad)
    buffers = dict(model.named_buffers())
    return {
        "output": y.detach(),
        "running mean": buffers["0.running_mean"],
        "running variance": buffers["0.running_var"],
        **dict(zip(names, gradients, strict=True)),
    }


def skip(strategy: str, kind: str, device: torch.device) -> str | None:
    """Takes a good step, one that must not count, and a good one, with a strategy."""
    case = parity.CASES.get(strategy) or parity.GPU_CASES[strategy]
    factor, alone = KINDS[kind]
    config = parity.configuration(case)
    engine = parity.build_engine(case, config, device)
    objective = SwAV(crops=sum(parity.CROPS))
    apply_schedule(engine.param_groups, lr=parity.LR)

    def values() -> dict[str, list[Tensor]]:
        return {part.name: [part.values.clone(), part.momentum.clone()] for part in engine.slices()}

    def step(number: int, times: float) -> float:
        loss, _ = objective(*engine(parity.my_crops(number, device), None))
        engine.backward(loss * times)
        norm = engine.step()
        assert norm is not None
        return float(norm)

    step(0, 1.0)
    before = values()
    mine = factor if not alone or distributed.rank() == distributed.world_size() - 1 else 1.0
    norm = step(1, mine)
    after = values()
    moved = [
        name
        for name in before
        if not all(map(torch.equal, before[name], after[name]))  # bit for bit
    ]
    wrong = [f"it moved {len(moved)} tensors, {moved[0]} first"] if moved else []
    if math.isfinite(norm):
        wrong.append(f"its gradient's norm is {norm}, so that it counts as good")
    if not math.isfinite(last := step(2, 1.0)):
        wrong.append(f"the norm of the good step behind it is {last}")
    elif all(map(torch.equal, next(iter(values().values())), next(iter(after.values())))):
        wrong.append("the good step behind it moved nothing")
    return "; ".join(wrong) or None


def momentum_on_host(device: torch.device) -> str | None:
    """Compares three steps whose momentum is in pinned host memory with three on the device."""
    kept = []
    for on_host in (True, False):
        case = parity.CASES["ddp"]
        config = parity.configuration(case, optim={"momentum_on_host": on_host, "larc": True})
        engine = parity.build_engine(case, config, device)
        parity.run(engine, config, 3, device)
        parts = list(engine.slices())
        kept.append([part.values.clone() for part in parts])
        pinned = [part.momentum.device.type == "cpu" for part in parts]
        if on_host and not all(pinned):
            return "a momentum is on the GPU"
        if on_host and device.type == "cuda" and not all(p.momentum.is_pinned() for p in parts):
            return "a momentum on the host is not pinned"
    same = all(map(torch.equal, *kept))
    return None if same else "weights differ from those of a momentum on the GPU"


def pinned_images(device: torch.device) -> str | None:
    """Copies pixels from pinned memory as the loader does, and compares them."""
    pixels = torch.arange(3 * 64 * 64, dtype=torch.uint8).view(1, 64, 64, 3)
    source = pixels.pin_memory() if device.type == "cuda" else pixels
    if device.type == "cuda" and not source.is_pinned():
        return "memory is not pinned"
    copied = source.to(device, non_blocking=True)
    return None if torch.equal(copied.cpu(), pixels) else "the copy has other pixels"


def timeouts(strategy: str, device: torch.device) -> str | None:
    """Lists the timeouts of all process groups that a strategy leaves; they are the run's."""
    case = parity.CASES.get(strategy) or parity.GPU_CASES[strategy]
    config = parity.configuration(case, sharding={**case.sharding, "sync_bn_group_size": 2})
    parity.build_engine(case, config, device)
    found = [
        group._get_backend(device).options._timeout / timedelta(minutes=1)
        for group in dist.distributed_c10d._world.pg_map
    ]
    wrong = sorted({minutes for minutes in found if minutes != MINUTES})
    return f"groups wait {wrong} minutes, not {MINUTES}" if wrong else None


def record_of_collectives(device: torch.device) -> str | None:
    """Asks torch's record for an all-reduce, which is noted as done some time after it."""
    dist.all_reduce(torch.ones(7, 3, device=device))
    deadline = time.monotonic() + 10
    while not (words := flight_recorder.present()).startswith("in none"):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    right = words.startswith("in none, after all_reduce ") and words.endswith(" on [7,3]")
    return None if right else f"it says {words!r} after an all-reduce of [7, 3]"


def snapshot_of_full_memory(device: torch.device) -> str | None:
    """Asks for more memory than there is, and looks for the snapshot of what was taken."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "snapshot.pickle"
        snapshot = MemorySnapshot(path)
        snapshot.attach()
        try:
            torch.empty(2**50, dtype=torch.uint8, device=device)
        except RuntimeError:
            return None if path.exists() else f"no snapshot was written{snapshot.sentence()}"
    return "an allocation of 2**50 bytes did not fail"


def too_little_memory(gib: float) -> str | None:
    """Says that a rank's GPU has less free memory than a case needs; every rank calls this."""
    free = 0.0
    if torch.cuda.is_available():
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = (torch.cuda.mem_get_info()[0] + cached) / 2**30
    least = min(distributed.gather_lists([free]))
    return f"needs {gib:g} GiB of free GPU memory, not {least:.1f}" if least < gib else None
