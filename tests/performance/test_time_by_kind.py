"""Time by kind, from traces whose answer is known by hand."""

from __future__ import annotations

from typing import Any

import pytest

from seer_scale.performance.time_by_kind import (
    COLLECTIVES,
    CONV,
    DATA,
    IDLE,
    LINEAR,
    LOSS,
    NORM,
    OPTIMIZER,
    OTHER,
    TimeByKind,
    kind_of,
    time_by_kind,
)

MAIN, AUTOGRAD, GLOO, STREAM, NCCL_STREAM = 1, 2, 3, 7, 8


def event(
    name: str, begin: float, end: float, cat: str = "cpu_op", tid: int = MAIN, **args: Any
) -> dict[str, Any]:
    """Times in milliseconds."""
    return {
        "ph": "X",
        "name": name,
        "cat": cat,
        "tid": tid,
        "pid": 0,
        "ts": 1000 * begin,
        "dur": 1000 * (end - begin),
        "args": args,
    }


def of(op: int) -> dict[str, Any]:
    """The arguments of an event of this operation."""
    return {"External id": op}


def named(name: str, begin: float, end: float) -> dict[str, Any]:
    return event(name, begin, end, "user_annotation")


def milliseconds(found: TimeByKind) -> dict[str, Any]:
    assert sum(found.by_kind.values()) == pytest.approx(found.seconds)
    return {kind: pytest.approx(1000 * s) for kind, s in found.by_kind.items() if s > 1e-9}


def test_on_a_cpu_the_innermost_kind_counts() -> None:
    events = [
        named("ProfilerStep#3", 0, 120),
        named("train step 4", 10, 110),
        named("data", 12, 22),
        named("forward", 22, 60),
        event("aten::conv2d", 25, 40),
        event("aten::mkldnn_convolution", 26, 39),
        event("aten::relu_", 41, 44),
        named("batch_norm", 45, 55),
        event("aten::add", 46, 50),
        named("loss", 60, 70),
        event("aten::mm", 61, 66),  # a kind of its own elsewhere
        named("backward", 70, 95),
        event("autograd::engine::evaluate_function: AddmmBackward0", 70, 80),
        event("aten::mm", 72, 80),
        event("_NormalizeBackward", 80, 95),
        event("aten::native_batch_norm_backward", 81, 90),
        named("optimizer", 95, 105),
        event("aten::convolution_backward", 130, 140),  # outside of the step
        {"ph": "i", "name": "Iteration Start", "ts": 0},
    ]
    assert milliseconds(time_by_kind(events)) == {
        DATA: 10,
        CONV: 15,
        NORM: 25,
        LOSS: 10,
        LINEAR: 8,
        OPTIMIZER: 10,
        OTHER: 100 - 78,
    }


def test_waiting_for_gloo_is_collective() -> None:
    def gloo(begin: float, end: float) -> dict[str, Any]:
        return event("gloo:all_reduce", begin, end, "user_annotation", GLOO)

    events = [
        named("train step 1", 0, 100),
        # A synchronous one: Python waits, also while gloo's thread wakes up and goes to sleep.
        named("batch_norm", 0, 30),
        event("c10d::allreduce_", 10, 11),
        gloo(13, 24),
        event("aten::div", 26, 28),
        # One that overlaps with computing, as DDP's: only what is waited for counts.
        event("c10d::allreduce_", 40, 41),
        event("aten::mkldnn_convolution", 41, 60),
        gloo(41, 80),
        event("aten::add", 90, 95),
    ]
    assert milliseconds(time_by_kind(events)) == {
        COLLECTIVES: (1 + 15) + 1 + 20,
        NORM: 10 + 4,
        CONV: 19,
        OTHER: 100 - 37 - 14 - 19,
    }


def test_on_a_gpu_kernels_count() -> None:
    def kernel(name: str, begin: float, end: float, op: int, stream: int = STREAM) -> Any:
        return event(name, begin, end, "kernel", stream, **{"External id": op, "stream": stream})

    events = [
        named("train step 7", 0, 100),
        event("data", 0, 20, "user_annotation", **of(1)),
        event("aten::conv2d", 20, 22, **of(2)),
        event("aten::cudnn_convolution", 20, 21, **of(3)),
        event("_NormalizeBackward", 10, 40, "cpu_op", AUTOGRAD, **of(4)),
        event("aten::mul", 12, 13, "cpu_op", AUTOGRAD, **of(5)),
        event("c10d::allreduce_", 23, 24, **of(6)),
        event("optimizer", 30, 35, "user_annotation", **of(7)),
        event("aten::addcmul_", 31, 32, **of(8)),
        event("train step 7", 20, 95, "gpu_user_annotation", STREAM),  # a copy of the range
        kernel("sm90_xmma_fprop", 25, 45, 3),
        kernel("vectorized_elementwise_kernel", 45, 55, 5),
        kernel("ncclDevKernel_AllReduce", 50, 75, 6, NCCL_STREAM),  # 5 ms behind the one above
        kernel("vectorized_elementwise_kernel", 80, 90, 8),
        event("Memcpy HtoD", 10, 14, "gpu_memcpy", NCCL_STREAM, **of(1)),
        event("Memcpy DtoD", 85, 95, "gpu_memcpy", NCCL_STREAM),
    ]
    assert milliseconds(time_by_kind(events)) == {
        DATA: 20,  # the copy in it included
        CONV: 20,
        NORM: 10,
        COLLECTIVES: 20,
        OPTIMIZER: 10,
        OTHER: 5,
        IDLE: 5 + 5 + 5,  # 20 to 25, 75 to 80, 95 to 100
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::cudnn_convolution", CONV),
        ("aten::convolution_backward", CONV),
        ("aten::cudnn_batch_norm", NORM),
        ("_Normalize", NORM),
        ("aten::batch_norm_update_stats", NORM),
        ("c10d::allreduce_", COLLECTIVES),
        ("nccl:all_reduce", COLLECTIVES),
        ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage)", COLLECTIVES),
        ("FSDP::all_gather (trunk.blocks.0)", COLLECTIVES),
        ("FSDP::post_backward_reduce (trunk.blocks.0)", COLLECTIVES),
        ("aten::addmm", LINEAR),
        ("aten::addcmul_", None),
        ("DistributedDataParallel.forward", None),
    ],
)
def test_names(name: str, kind: str | None) -> None:
    assert kind_of(name) == kind


def test_a_trace_without_a_step_is_refused() -> None:
    with pytest.raises(ValueError, match="no training step"):
        time_by_kind([named("forward", 0, 1)])


def test_the_table_has_every_kind_and_the_sum() -> None:
    found = time_by_kind([named("train step 1", 0, 40), named("train step 2", 50, 110)])
    lines = found.markdown().splitlines()
    assert lines[2] == "| other | 50.00 | 100.0% |"
    assert lines[-1] == "| step | 50.00 | 100.0% |"
    assert len(lines) == 2 + 9 + 1
