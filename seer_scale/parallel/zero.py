"""Strategy `zero`: DeepSpeed, stages 0 to 3, with offload. Only this file imports deepspeed.

ZeRO (arXiv 1910.02054) partitions, buckets and communicates as DeepSpeed implements it, but for the
cutting and joining of stage 3 (`zero_collectives`). The optimizer is `SliceSGD` with few groups of
joined tensors: what DeepSpeed does in Python grows with groups x ranks.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.config.ds_config import offload_device
from seer_scale.optim.filling import fill
from seer_scale.optim.groups import MOST_HELD, MOST_JOINED, join
from seer_scale.optim.loss_scale import LossScale
from seer_scale.optim.slice_sgd import SliceSGD
from seer_scale.optim.slices import Slice, Values
from seer_scale.parallel.zero_calls import add_up_calls, forget_calls
from seer_scale.parallel.zero_collectives import reduce_scatter_mean, wait_for_gathered

SILENT_SECONDS = 10.0  # that a start may take without a word
COMPILING = (
    "offload to nvme: DeepSpeed compiles its asynchronous file access for this machine; the first "
    "start takes some minutes longer"
)


def _deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise it warns that it found no GPU
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters, stage3
    from deepspeed.utils import logger, nvtx

    nvtx.enable_nvtx = False  # marks for a profiler, two at each of 10,000 calls of a step

    gathering = partition_parameters.AllGatherCoalescedHandle
    if stage3.reduce_scatter_coalesced is not reduce_scatter_mean:
        stage3.reduce_scatter_coalesced = reduce_scatter_mean
        original = gathering.wait
        gathering.wait = lambda handle, handle_dependency=True: wait_for_gathered(
            original, handle, handle_dependency
        )
    logger.setLevel(logging.ERROR)  # it warns about every optimizer that is not its own
    # On a CPU DeepSpeed would compile an all-reduce of its own at first use. That takes a minute
    # and a compiler, and a killed build leaves a lock that the next run waits for. gloo is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Warnings of torch about DeepSpeed's code, on every rank: the user cannot act on them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def missing_for_nvme() -> str | None:
    """Reason why DeepSpeed cannot offload to NVMe here, as part of a sentence; None if it can."""
    _deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        return None
    return (
        "DeepSpeed's asynchronous file access needs a C++ compiler and the headers of libaio "
        "(Debian: g++, libaio-dev)"
    )


def compile_for_nvme() -> None:
    """Compiles DeepSpeed's asynchronous file access, once on a machine; rank 0 says so if slow."""
    _deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    said = threading.Timer(SILENT_SECONDS, print, [COMPILING], {"file": sys.stderr, "flush": True})
    if distributed.is_main():
        said.start()
    try:
        AsyncIOBuilder().load(verbose=False)
    finally:
        said.cancel()


def fill_partitioned(
    model: nn.Module, values: Values, ds_config: dict[str, Any], device: torch.device
) -> None:
    """Gives a model on meta its values and partitions it for stage 3, layer by layer, in place.

    No rank ever holds more than one whole layer beside its own partitions.

    Args:
        model: model on meta.
        values: where values come from.
        ds_config: resolved DeepSpeed configuration.
        device: device of this rank.
    """
    deepspeed = _deepspeed()
    names = {tensor: name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    for layer in model.modules():
        own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        if not own:
            continue
        mine = [names[tensor] for tensor in own]
        layer.to_empty(device=device, recurse=False)
        fresh = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
        _fill_layer(layer, values, dict(zip(fresh, mine, strict=True)))
        if any(True for _ in layer.parameters(recurse=False)):
            deepspeed.zero.Init(module=layer, config_dict_or_path=ds_config, dtype=torch.float32)


def gather_as(low: torch.dtype, layers: Iterable[nn.Module]) -> None:
    """Makes stage 3 gather the weights of `layers` in the type `low`.

    Gathered weights are float32 again, with the bits of `low`: only the messages are shorter.
    Gradients are reduced in float32 as before, because DeepSpeed asks for this type of a parameter
    there only under its own autocast.
    """
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            parameter.comm_dtype = low  # type: ignore[attr-defined]


def _fill_layer(layer: nn.Module, values: Values, names: dict[Tensor, str]) -> None:
    children, layer._modules = layer._modules, {}
    try:
        fill(layer, values, names)
    finally:
        layer._modules = children


class ZeroEngine:
    """An `Engine` of strategy `zero`.

    Args:
        model: a model with values; partitioned already for stage 3.
        groups: the model's parameter groups, one per tensor.
        build_optimizer: makes the optimizer, given its groups and the number of shards.
        ds_config: resolved DeepSpeed configuration; it has the gradient accumulation too.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        build_optimizer: Callable[[list[dict[str, Any]], int], SliceSGD],
        ds_config: dict[str, Any],
    ) -> None:
        deepspeed = _deepspeed()
        self.model = model
        zero = ds_config.get("zero_optimization", {})
        self._stage = int(zero.get("stage", 0))
        self._offload = offload_device(zero, "offload_optimizer")
        shards = distributed.world_size() if self._stage > 0 else 1
        if self._stage > 0:
            groups = join(groups, most=self._most_joined(zero), cut_first=self._stage == 3)
        self._optimizer = build_optimizer(groups, shards)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=ds_config,
            dist_init_required=False,
        )
        if self._stage == 3:
            add_up_calls(model)
        self._leave_norms_to_the_optimizer()
        if self._stage in (1, 2) and self._offload == "none":
            # DeepSpeed would keep the whole gradient of every tensor that reaches into this rank's
            # partition. This buffer is as small as the partition; DeepSpeed uses it only for
            # gradients of another type than the weights.
            self._engine.optimizer._use_compact_grad_partition_buffer = lambda group: True

        self._persistent: list[Any] = []
        if self._stage == 3 and offload_device(zero, "offload_param") != "nvme":
            # DeepSpeed gathers them after every step, each by a collective of its own.
            self._persistent = list(self._engine.optimizer.persistent_parameters)
            self._engine.optimizer.persistent_parameters = []

    def __call__(self, crops: list[Tensor], queue: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._stage == 3:
            forget_calls(self.model)
        embeddings, scores = self._engine(crops, queue)
        return embeddings, scores

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.loss_scale.value if self.loss_scale else loss)

    def step(self) -> Tensor | None:
        last: bool = self._engine.is_gradient_accumulation_boundary()
        if last and self._stage > 0 and self._offload != "nvme":
            self._reduce_norms()
        self._engine.step()
        if last and self._stage == 3 and torch.cuda.is_available():
            # DeepSpeed gathers on a stream of its own, which does not wait for the update. The
            # gathers one by one that it made here ended in such a wait of the host.
            torch.cuda.current_stream().synchronize()
        if last and self._persistent:
            self._persistent[0].all_gather_coalesced(self._persistent).wait()
        return self._optimizer.take_grad_norm() if last else None

    @property
    def loss_scale(self) -> LossScale | None:
        return self._optimizer.loss_scale

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.tensors

    def slices(self) -> Iterator[Slice]:
        if self._stage < 3:
            yield from self._optimizer.slices()
            return
        zero = self._engine.optimizer
        for index, group in enumerate(self._optimizer.param_groups):  # a sub-group each
            swapped = zero._swappable_optimizer_subgroup(index)
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(index)
            # ZeRO-3 gives the masters to the optimizer only during a step.
            group["params"] = [zero.fp32_partitioned_groups_flat[index]]
            try:
                yield from self._optimizer.slices()
            finally:
                group["params"] = []
                if swapped:
                    zero.optimizer_swapper.swap_out_optimizer_state(
                        parameter=zero.fp32_partitioned_groups_flat[index]
                    )

    @property
    def slices_stay(self) -> bool:
        return self._offload != "nvme"

    @property
    def holds_all(self) -> bool:
        return self._stage == 0

    def written_slices(self) -> Iterator[Slice]:
        if self._stage > 0 or distributed.is_main():
            yield from self.slices()

    def _most_joined(self, zero: dict[str, Any]) -> int:
        """Elements of a joined group; 0 for one group per tensor."""
        if self._offload == "nvme":  # a group is in memory as a whole
            return 0
        if zero.get("round_robin_gradients") or zero.get("parameter_alignment"):
            return 0  # DeepSpeed would join in another order, or with gaps
        if self._stage < 3:
            return MOST_JOINED
        # Stage 3 cuts groups of which a rank holds more than this into sub-groups; 1e9 is its own.
        whole = int(zero.get("sub_group_size", 10**9))
        return min(MOST_HELD * distributed.world_size(), whole)

    def _leave_norms_to_the_optimizer(self) -> None:
        """Replaces DeepSpeed's norms of gradients by 0, where `compute_grad_norm` cannot.

        DeepSpeed returns from a step whose norm is not finite before it calls the optimizer, and
        says so nowhere. It also reduces each tensor's norm alone and copies it to the host.
        """
        zero = self._engine.optimizer
        if self._stage == 3:
            zero._get_norm_groups = lambda: [torch.zeros(())]
        elif self._stage > 0 and self._offload != "none":
            zero.scaled_global_norm = lambda norm_type=2: torch.zeros(())

    def _reduce_norms(self) -> None:
        """Reduces all norms at once, from this rank's partitions of the mean gradient.

        Not called with offload to NVMe: gradients are on disk, and each tensor is reduced alone.
        """
        if self._offload == "cpu" and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # gradients may still be being copied
        zero = self._engine.optimizer
        masters = (
            zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else zero.single_partition_of_fp32_groups
        )
        gradients = {}
        groups = self._optimizer.param_groups
        for index, (group, master) in enumerate(zip(groups, masters, strict=True)):
            parts = [master.grad] if self._offload == "cpu" else zero.averaged_gradients.get(index)
            if parts is not None and parts[0] is not None:
                gradients[group["name"]] = parts
            if self._stage == 3:
                group["params"] = [master]
        try:
            self._optimizer.reduce_norms(gradients)
        finally:
            if self._stage == 3:
                for group in groups:
                    group["params"] = []
