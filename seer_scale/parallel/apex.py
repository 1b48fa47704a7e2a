"""NVIDIA Apex, where installed: op policy O1 and SyncBatchNorm. Only this file imports apex.

Apex removed both after tag 25.05, and both need CUDA. The package `apex` on PyPI is another
project.
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

from seer_scale.models import OnTrunk
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm


def missing_amp(*, cuda: bool) -> str | None:
    """Reason why `train.precision=apex-o1` cannot run here, as part of a sentence; None if it can.

    Args:
        cuda: whether this machine has a GPU.
    """
    return _missing("apex.amp", "initialize", cuda=cuda)


def missing_syncbn(*, cuda: bool) -> str | None:
    """Reason why `sharding.syncbn=apex` cannot run here, as part of a sentence; None if it can.

    Args:
        cuda: whether this machine has a GPU.
    """
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
    """Silences Apex's warnings that the parts used here are deprecated."""
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
    """Creates Apex's layer over `group`, or the native layer if `group` is None (this rank alone).

    Apex's layer updates its running statistics in every forward pass, a recomputed one too, so it
    must not be used with activation checkpointing. Its kernels take float32 and float16.

    Args:
        num_features: number of channels C.
        group: ranks that share statistics.
        eps: number that is added to the variance.
        momentum: share of a step's statistics in the running statistics.
        device: device of parameters and buffers.
    """
    if group is None:  # Apex would take None for the world
        return GroupedSyncBatchNorm(num_features, eps=eps, momentum=momentum, device=device)
    from apex.parallel import SyncBatchNorm

    with torch.device(device), _quiet():
        layer: _BatchNorm = SyncBatchNorm(
            num_features, eps=eps, momentum=momentum, process_group=group
        )
    return layer


def apply_o1(model: OnTrunk) -> None:
    """Makes the forward pass of `model` run under Apex's policy O1, in place.

    O1 replaces functions of torch for the whole process. Here these functions cast only inside of
    the model's forward pass, and not in its `float32_parts`: loss, Sinkhorn and optimizer stay
    float32, as under torch's autocast. Loss scaling is `optim.loss_scale.LossScale`, not Apex's.

    Args:
        model: a model whose blocks are not checkpointed yet, since a recomputation has to cast too.
    """
    casts = _o1()
    for stage in model.blocks():
        for block in stage:
            block.forward = _switched(block.forward, casts, on=True)
    for part in model.float32_parts():
        part.forward = _switched(part.forward, casts, on=False)
    model.forward = _switched(model.forward, casts, on=True)


@functools.cache
def _o1() -> Any:
    """Initialises Apex once per process; returns its handle, with casting switched off."""
    with _quiet():
        from apex import amp

        # O1 does nothing to a model, but refuses a model without memory: an empty one will do.
        amp.initialize(nn.Module(), opt_level="O1", loss_scale=1.0, verbosity=0)
    handle = amp._amp_state.handle
    # The cache would keep a float16 copy of every weight. It also fails where a weight is used
    # twice, because it expects casts as torch recorded them in 2019.
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
