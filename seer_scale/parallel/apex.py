"""NVIDIA Apex where it is installed: op policy O1 and its SyncBatchNorm. Alone imports apex.

Both left Apex after tag 25.05, and both need CUDA. PyPI's `apex` is another project.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale.models import MultiCropModel
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm


def missing_amp(*, cuda: bool) -> str | None:
    """Why `train.precision=apex-o1` cannot be had here, as part of a sentence; None if it can."""
    return _missing("apex.amp", "initialize", cuda=cuda)


def missing_syncbn(*, cuda: bool) -> str | None:
    """Why `sharding.syncbn=apex` cannot be had here, as part of a sentence; None if it can."""
    if reason := _missing("apex.parallel", "SyncBatchNorm", cuda=cuda):
        return reason
    if importlib.util.find_spec("syncbn") is None:
        return "Apex is installed without its CUDA extensions (build it with --cuda_ext)"
    return None


def _missing(part: str, name: str, *, cuda: bool) -> str | None:
    if not cuda:
        return "NVIDIA Apex needs a CUDA GPU and there is none"
    if importlib.util.find_spec("apex") is None:
        return f"NVIDIA Apex is not installed (its tags up to 25.05 have {part})"
    try:
        with _quiet():
            found = hasattr(importlib.import_module(part), name)
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("apex"):
            return f"the installed Apex cannot be imported ({error})"
        found = False
    except ImportError as error:
        return f"the installed Apex cannot be imported ({error})"
    return None if found else f"the installed apex has no {part} (NVIDIA's has, up to tag 25.05)"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Apex's warnings that it is going to drop what this file is about."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def sync_batchnorm(
    num_features: int,
    group: dist.ProcessGroup | None,
    *,
    eps: float,
    momentum: float,
    device: torch.device | str,
) -> _BatchNorm:
    """Apex's layer over `group`; ours where the group is this rank alone.

    It moves its statistics in every forward pass, a recomputed one too: not to be used with
    activation checkpointing. Its kernels take float32 and float16.
    """
    if group is None:  # which to Apex means the world
        return GroupedSyncBatchNorm(num_features, eps=eps, momentum=momentum, device=device)
    from apex.parallel import SyncBatchNorm

    with torch.device(device), _quiet():
        layer: _BatchNorm = SyncBatchNorm(
            num_features, eps=eps, momentum=momentum, process_group=group
        )
    return layer


def apply_o1(model: MultiCropModel) -> None:
    """Runs the forward pass of `model` under Apex's policy O1, in place.

    O1 replaces functions of torch for the whole process. Here they cast inside of the model's
    forward only, and not in the prototypes: loss, Sinkhorn and optimizer stay float32, as under
    torch's autocast. Loss scaling is `precision.LossScale`, not Apex's.

    Args:
        model: whose blocks are not yet checkpointed: a recomputation has to cast as well.
    """
    casts = _o1()
    for stage in model.blocks():
        for block in stage:
            block.forward = _switched(block.forward, casts, on=True)
    model.prototypes.forward = _switched(model.prototypes.forward, casts, on=False)  # type: ignore[method-assign]
    model.forward = _switched(model.forward, casts, on=True)  # type: ignore[method-assign]


@functools.cache
def _o1() -> Any:
    """Apex's handle on what it has replaced, switched off; once a process, as Apex asks."""
    with _quiet():
        from apex import amp

        # O1 does nothing to a model, and would refuse one that has no memory yet.
        amp.initialize(nn.Module(), opt_level="O1", loss_scale=1.0, verbosity=0)
    handle = amp._amp_state.handle
    # Its cache would keep a float16 copy of every weight, and breaks where a weight is used twice:
    # it expects casts as torch recorded them in 2019.
    handle._enable_caching = False
    handle._is_active = False
    return handle


def _switched(forward: Callable[..., Any], casts: Any, *, on: bool) -> Callable[..., Any]:
    @functools.wraps(forward)
    def switched(*args: Any, **kwargs: Any) -> Any:
        before = casts._is_active
        casts._is_active = on
        try:
            return forward(*args, **kwargs)
        finally:
            casts._is_active = before

    return switched
