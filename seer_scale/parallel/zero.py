"""Strategy `zero`: DeepSpeed, stages 0 to 3, with offload. The only file that imports deepspeed.

DeepSpeed keeps its partitioning, bucketing and communication; the optimizer is ours, with one
parameter group per tensor, so that every partition it is handed is a slice of a single tensor.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seer_scale import distributed
from seer_scale.optim.slice_sgd import SliceSGD
from seer_scale.optim.slices import Slice, Values, fill
from seer_scale.parallel.precision import LossScale


def _deepspeed() -> Any:
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns that it found no other
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)  # it warns of every optimizer that is not its own
    # On CPU DeepSpeed would compile an all-reduce of its own at first use: a minute, a
    # compiler, and a lock that a killed build leaves for the next run to wait on. gloo does.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Of torch to DeepSpeed, on every rank: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    if torch.distributed.is_initialized() and not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_init_required=False)
    return deepspeed


def missing_for_nvme() -> str | None:
    """What DeepSpeed lacks for offload to NVMe on this machine, as part of a sentence."""
    _deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if AsyncIOBuilder().is_compatible(verbose=False):
        return None
    return "DeepSpeed's asynchronous file access needs libaio and its headers (Debian: libaio-dev)"


def fill_partitioned(
    model: nn.Module, values: Values, ds_config: dict[str, Any], device: torch.device
) -> None:
    """Stage 3: gives a model on meta its values and partitions it, layer by layer, in place.

    No rank ever holds more than one layer whole, beside its own partitions.
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


def _fill_layer(layer: nn.Module, values: Values, names: dict[Tensor, str]) -> None:
    children, layer._modules = layer._modules, {}
    try:
        fill(layer, values, names)
    finally:
        layer._modules = children


class ZeroEngine:
    """See `Engine`. Gradient accumulation follows `ds_config`."""

    def __init__(
        self,
        model: nn.Module,
        build_optimizer: Callable[[nn.Module, int], SliceSGD],
        ds_config: dict[str, Any],
    ) -> None:
        deepspeed = _deepspeed()
        self.model = model
        zero = ds_config.get("zero_optimization", {})
        self._stage = int(zero.get("stage", 0))
        self._offload = _device(zero, "offload_optimizer")
        shards = distributed.world_size() if self._stage > 0 else 1
        self._optimizer = build_optimizer(model, shards)
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=self._optimizer,
            config=ds_config,
            dist_init_required=False,
        )
        if self._stage == 3:
            for module in model.modules():
                module.register_forward_pre_hook(_remember_calls, prepend=True)
                module.register_forward_pre_hook(_add_calls)
        if self._stage == 2 and self._offload == "none":
            # DeepSpeed would keep the whole gradient of a tensor that reaches into this rank's
            # partition, and with one group per tensor all of them do. Its buffer for no more than
            # the partition is otherwise for gradients summed in another type than the weights'.
            self._engine.optimizer._use_compact_grad_partition_buffer = lambda group: True

    def __call__(self, crops: list[Tensor], queue: Tensor | None) -> tuple[Tensor, Tensor]:
        if self._stage == 3:  # a pass whose backward was left out leaves calls behind
            for module in self.model.modules():
                vars(module)["ds_grads_remaining"] = 0
        embeddings, scores = self._engine(crops, queue)
        return embeddings, scores

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.loss_scale.value if self.loss_scale else loss)

    def step(self) -> Tensor | None:
        last: bool = self._engine.is_gradient_accumulation_boundary()
        if last and self._stage > 0 and self._offload != "nvme":
            self._reduce_norms()
        self._engine.step()
        return self._optimizer.take_grad_norm() if last else None

    @property
    def loss_scale(self) -> LossScale | None:
        return self._optimizer.loss_scale

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups

    def slices(self) -> Iterator[Slice]:
        if self._stage < 3:
            yield from self._optimizer.slices()
            return
        zero = self._engine.optimizer
        for index in range(len(zero.fp16_groups)):  # one tensor each
            swapped = zero._swappable_optimizer_subgroup(index)
            if swapped:
                zero._optimizer_states_and_gradient_swap_in(index)
            group = self.param_groups[zero.sub_group_to_group_id[index]]
            # ZeRO-3 shows the masters to the optimizer only during a step.
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
    def writes_slices(self) -> bool:
        return self._stage > 0 or distributed.is_main()

    def _reduce_norms(self) -> None:
        """One all-reduce instead of one per tensor, from the partitions of the mean gradient.

        With offload to NVMe gradients are on disk, and the optimizer reduces tensor by tensor.
        """
        if self._offload == "cpu" and torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()  # gradients may still be on their way
        zero = self._engine.optimizer
        masters = (
            zero.fp32_partitioned_groups_flat
            if self._stage == 3
            else zero.single_partition_of_fp32_groups
        )
        gradients = {}
        for index, (group, master) in enumerate(zip(self.param_groups, masters, strict=True)):
            parts = [master.grad] if self._offload == "cpu" else zero.averaged_gradients.get(index)
            if parts is not None and parts[0] is not None:
                gradients[group["name"]] = parts
            if self._stage == 3:
                group["params"] = [master]
        try:
            self._optimizer.reduce_norms(gradients)
        finally:
            if self._stage == 3:
                for group in self.param_groups:
                    group["params"] = []


# Stage 3 frees a layer when as many gradients have come to its inputs as it has had calls. But
# DeepSpeed starts to count anew at every call, so that a layer which two resolutions go through
# would be freed after the first one's backward pass, be gathered again for the other's, and stay
# whole until the end: by then every rank would hold the whole model.
def _remember_calls(module: nn.Module, _: object) -> None:
    own = vars(module)
    own["_calls_before"] = own.get("ds_grads_remaining", 0)


def _add_calls(module: nn.Module, _: object) -> None:
    own = vars(module)
    if torch._C._current_graph_task_id() != -1:  # a recomputation: no gradient goes through it
        own["ds_grads_remaining"] = 0
    own["ds_grads_remaining"] += own["_calls_before"]


def _device(zero: dict[str, Any], section: str) -> str:
    return str((zero.get(section) or {}).get("device", "none"))
