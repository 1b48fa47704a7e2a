"""A GPU that does not exist: tensors of device cuda without memory, and torch's streams for them.

Operators run as on a GPU as far as types, shapes, devices and the choice of kernels go; nothing is
computed. What a GPU would answer with a wait or an error is an error here: a read of a value, a
shape that depends on values, a mixture of devices, an operator without a kernel for CUDA.
"""

from __future__ import annotations

import ctypes
import re
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
# What shapes alone cannot say, because torch has no kernel for tensors without memory.
SHAPES: dict[Any, Callable[..., Any]] = {
    aten.record_stream.default: lambda *_: None,
    aten.batch_norm_update_stats.default: lambda x, mean, variance, momentum: (
        torch.empty_like(mean),
        torch.empty_like(variance),
    ),
    aten.batch_norm_stats.default: lambda x, _: (_wide(x), _wide(x)),
    aten.batch_norm_gather_stats_with_counts.default: lambda x, *_: (_wide(x), _wide(x)),
    aten.batch_norm_elemt.default: lambda x, *_: torch.empty_like(x),
    aten.batch_norm_backward_reduce.default: lambda _, x, mean, inverse_std, weight, *__: (
        *(_wide(x), _wide(x)),
        *(torch.empty_like(weight), torch.empty_like(weight)),
    ),
    aten.batch_norm_backward_elemt.default: lambda _, x, *__: torch.empty_like(x),
    aten._fused_sgd_.default: lambda *_, **__: None,
}
# Made once, of numbers on the host, which are there; the model on meta, because a module cannot
# replace fake parameters by others.
ON_HOST = (
    "seer_scale.parallel.engine.build_mesh",
    "seer_scale.optim.slices.compute_local_shape_and_global_offset",
    "seer_scale.train.build_engine.model_of",
    "seer_scale.train.build.model_of",
    "seer_scale.parallel.engine.align_channels",
    # FSDP's views of a tensor, one for each rank.
    "torch.distributed.fsdp._fully_shard._fsdp_param._chunk_with_empty",
)
Reads = Mapping[tuple[str, str], float]  # (file, function) -> what the host reads there
_kept: list[Any] = []  # what C++ points to


class Mode(FakeTensorMode):
    """torch's mode, for a GPU that it must not use.

    Args:
        allowed: places that may read a value.

    Attributes:
        reads: how often each place has read.
        stepping: whether collectives are the model's; before, torch sends objects on the host.
    """

    avoid_device_init = True

    def __init__(self, allowed: Reads) -> None:
        super().__init__(allow_non_fake_inputs=True, allow_fallback_kernels=False)
        self.allowed = allowed
        self.reads: Counter[tuple[str, str]] = Counter()
        self.stepping = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs an operator on shapes alone.

        Raises:
            NotImplementedError: the operator has no kernel for CUDA.
            RuntimeError: its tensors are on several devices, or a collective's on the host.
        """
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # The namespace prim has questions about a tensor, not operators.
        if func.namespace != "prim" and any(tensor.is_cuda for tensor in given):
            if func is aten._local_scalar_dense.default and (value := self.read()) is not None:
                return value
            check_kernel(func.name())
        on_gpu = all(tensor.is_cuda for tensor in given)
        if self.stepping and func.namespace == "c10d" and not on_gpu:
            raise RuntimeError(f"{func} got a tensor on the host: NCCL takes tensors on GPUs only")
        if func not in SHAPES:
            return super().__torch_dispatch__(func, types, args, kwargs)
        if len(devices := {tensor.device for tensor in given}) > 1:
            raise RuntimeError(f"{func} got tensors of {devices}")
        with self:
            return SHAPES[func](*args, **(kwargs or {}))

    def read(self) -> float | None:
        """Returns what the calling place reads of a tensor, None if it must not."""
        frames = [f for f in traceback.extract_stack() if "seer_scale" in f.filename]
        place = (Path(frames[-1].filename).name, frames[-1].name) if frames else ("", "")
        if place in self.allowed:
            self.reads[place] += 1
        return self.allowed.get(place)


@cache
def check_kernel(operator: str) -> None:
    """Raises NotImplementedError if an operator has no kernel for CUDA, composed ones included."""
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(operator, "CUDA"):
        raise NotImplementedError(f"{operator} has no kernel for CUDA")


class Stream(torch.Stream):
    """A stream on which nothing happens."""

    def __new__(cls, *_: Any, **__: Any) -> Stream:  # noqa: D102
        return super().__new__(cls, stream_id=0, device_index=0, device_type=1)

    def wait_stream(self, stream: torch.Stream) -> None:
        """Waits for nothing."""

    def wait_event(self, event: Any) -> None:
        """Waits for nothing."""

    def record_event(self, event: Any = None) -> Any:
        """Returns an event that has happened."""
        return event or Event()

    def synchronize(self) -> None:
        """Fails: the host waits."""
        raise AssertionError("the host waits for a stream")


class Event:
    """An event that has happened."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> Event:
        """Returns itself, as FSDP expects."""
        return self

    def wait(self, *_: Any) -> None:
        """Waits for nothing."""

    def elapsed_time(self, other: Event) -> float:
        """Returns the milliseconds to another event."""
        return 0.0

    def synchronize(self) -> None:
        """Fails: the host waits."""
        raise AssertionError("the host waits for an event")


def _waits(*_: Any) -> None:
    raise AssertionError("the host waits for the GPU")


STREAM = Stream()
CUDA: dict[str, Any] = {  # what torch.cuda has instead
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda _: None,
    "device": lambda _: nullcontext(),
    "is_bf16_supported": lambda *_, **__: True,
    "get_device_name": lambda *_: "NVIDIA H100 80GB HBM3",
    "current_stream": lambda *_: STREAM,
    "stream": lambda _: nullcontext(),
    "synchronize": _waits,
    "Stream": Stream,
    "Event": Event,
    "max_memory_allocated": lambda *_: 0,
}


@contextmanager
def fake_gpu(allowed: Reads) -> Iterator[Mode]:
    """Inside, torch finds a GPU, and new tensors have no memory; for a process of its own.

    Args:
        allowed: places that may read a value.
    """
    _let_autograd_run()
    with ExitStack() as stack:
        for name, value in CUDA.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        for where in ON_HOST:
            module, _, name = where.rpartition(".")
            real = getattr(import_module(module), name)
            stack.enter_context(patch(where, _on_host(real)))
        stack.enter_context(patch("torch.distributed.get_backend", lambda *_: "nccl"))
        # Pinned memory is the driver's; the other makes a real tensor on the GPU.
        stack.enter_context(patch.object(Tensor, "pin_memory", lambda tensor, *_: tensor))
        stack.enter_context(patch.object(fake_tensor, "init_gpu_context", lambda _: None))
        mode = stack.enter_context(Mode(allowed))

        def as_list(tensor: Tensor) -> list[float]:
            value = mode.read()
            if value is None:
                raise fake_tensor.DataDependentOutputException(aten._local_scalar_dense.default)
            return [value] * tensor.numel()

        stack.enter_context(patch.object(FakeTensor, "tolist", as_list))
        yield mode


def _wide(x: Tensor) -> Tensor:
    """A number per channel, in the type that GPUs compute statistics in."""
    return x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


def _on_host(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **kwargs)

    return called


def _let_autograd_run() -> None:
    """Makes the backward pass believe that no GPU has been used yet, without asking a driver.

    torch replaces CUDA's device guard by one that does nothing where no GPU is, and yet asks the
    driver whether device 0 has a context. The answer here is no. Builds without CUDA do not ask.
    """
    if _kept or torch.version.cuda is None:
        return
    root = Path(torch.__file__).parent
    header = (root / "include" / "ATen" / "detail" / "AcceleratorHooksInterface.h").read_text()
    functions = re.findall(r"virtual[^;{(]*?([~\w]+)\(", header)
    slot = functions.index("hasPrimaryContext") + 1  # the destructor has two
    hooks = ctypes.CDLL(str(root / "lib" / "libtorch_cpu.so"))._ZN2at6detail12getCUDAHooksEv
    hooks.restype = ctypes.c_void_p
    pointers, size, before = ctypes.POINTER(ctypes.c_void_p), ctypes.sizeof(ctypes.c_void_p), 2
    table = ctypes.cast(hooks(), pointers)  # the object begins with the address of its functions
    whole = ctypes.cast(table[0] - before * size, pointers)  # two entries come before these
    own = (ctypes.c_void_p * 128)(*(whole[index] for index in range(128)))
    no = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_byte)(lambda *_: False)
    own[before + slot] = ctypes.cast(no, ctypes.c_void_p).value
    table[0] = ctypes.addressof(own) + before * size
    _kept.extend([own, no])
