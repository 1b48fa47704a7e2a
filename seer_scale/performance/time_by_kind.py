"""Divides the time of profiled steps by kind, from the events of a Chrome trace.

Every moment of a step has exactly one kind, so that all kinds sum to the time of the steps. On a
GPU, a moment has the kind of the running kernel; it counts as a collective only if no other kernel
runs. On a CPU, a moment has the kind of the innermost event of the training thread that has a kind.
A kernel has the kind of the operator that launched it.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

CONV, LINEAR, NORM = "convolution", "linear", "batch norm"
COLLECTIVES, OPTIMIZER, LOSS = "collectives", "optimizer", "loss"
DATA, IDLE, OTHER = "data wait", "device idle", "other"
KINDS = (CONV, LINEAR, NORM, COLLECTIVES, OPTIMIZER, LOSS, DATA, IDLE, OTHER)

STEP = re.compile(r"^train step \d+$")  # the range that the profiler puts around a step
NORM_RANGE = "batch_norm"  # the range around a BatchNorm layer
# Tried in this order. Events inside a range of `CLOSED` have its kind, except for collectives.
PATTERNS = {
    COLLECTIVES: re.compile(
        r"^(c10d::|_c10d_functional::|gloo:|nccl|fsdp::|FSDP::(all_gather|post_backward_re))"
    ),
    CONV: re.compile(r"^aten::\w*conv"),
    NORM: re.compile(rf"^({NORM_RANGE}$|aten::\w*batch_norm|_Normalize|seer_scale::group_stat)"),
    LINEAR: re.compile(r"^aten::(linear|addmm|mm|matmul|bmm)$"),
    OPTIMIZER: re.compile(r"^optimizer$"),
    LOSS: re.compile(r"^loss$"),
    DATA: re.compile(r"^data$"),
}
CLOSED = (OPTIMIZER, LOSS, DATA)
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # categories of events
HOST = ("cpu_op", "user_annotation")
OPERATOR = re.compile(r"^(?!autograd::)\w+::\w+$")  # neither a range nor a node of autograd


class Piece(NamedTuple):
    """A stretch of time, in microseconds, that has one kind."""

    begin: float
    end: float
    kind: str
    operator: bool  # whether the host was inside an operator, and not in Python


@dataclass(frozen=True)
class TimeByKind:
    """The time of all profiled steps together.

    Attributes:
        steps: number of steps.
        seconds: seconds of all steps.
        by_kind: seconds of every kind in `KINDS`; their sum is `seconds`.
    """

    steps: int
    seconds: float
    by_kind: dict[str, float]

    def markdown(self) -> str:
        """Writes a Markdown table with a row per kind, the longest time first."""
        rows = sorted(self.by_kind.items(), key=lambda item: -item[1])
        lines = ["| kind | ms per step | share |", "|---|---|---|"]
        for kind, seconds in [*rows, ("step", self.seconds)]:
            share = seconds / self.seconds
            lines.append(f"| {kind} | {1000 * seconds / self.steps:.2f} | {share:.1%} |")
        return "\n".join(lines) + "\n"


def time_by_kind(events: Sequence[dict[str, Any]]) -> TimeByKind:
    """Computes the time of every kind from a trace.

    Args:
        events: `traceEvents` of a Chrome trace by torch's profiler.

    Raises:
        ValueError: if the trace contains no whole step.
    """
    events = [event for event in events if event.get("ph") == "X"]
    steps = [event for event in events if STEP.match(event["name"])]
    steps = [event for event in steps if event["cat"] == "user_annotation"]
    if not steps:
        raise ValueError("the trace holds no training step")
    pieces, operators = _host(events, thread=steps[0]["tid"])
    kernels = [_on_device(event, operators) for event in events if event["cat"] in DEVICE]
    in_flight = _in_flight(events)
    total: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for step in steps:
        begin, end = step["ts"], step["ts"] + step["dur"]
        inside = [piece for piece in pieces if begin <= piece.begin and piece.end <= end]
        spent = _of_device(kernels, inside, begin, end) if kernels else _of_host(inside, in_flight)
        for kind, microseconds in spent.items():
            total[kind] += microseconds / 1e6
    return TimeByKind(len(steps), sum(step["dur"] for step in steps) / 1e6, total)


def kind_of(name: str) -> str | None:
    """Kind of an event by its own name; None if the name says nothing."""
    return next((kind for kind, pattern in PATTERNS.items() if pattern.search(name)), None)


def _host(events: Iterable[dict[str, Any]], thread: int) -> tuple[list[Piece], dict[int, str]]:
    """Pieces of the training thread in order; and external id -> kind, for all threads."""
    by_thread = defaultdict(list)
    for event in events:
        if event["cat"] in HOST:
            by_thread[event["tid"]].append(event)
    kinds: dict[int, str] = {}
    pieces = {tid: _pieces(mine, kinds) for tid, mine in by_thread.items()}
    return pieces[thread], kinds


def _pieces(events: list[dict[str, Any]], kinds: dict[int, str]) -> list[Piece]:
    """Cuts the time of one thread where an event begins or ends; adds to `kinds`."""
    # Of events that begin at the same time, the longest is the outermost.
    events = sorted(events, key=lambda event: (event["ts"], -event["dur"]))
    pieces: list[Piece] = []
    open_events: list[tuple[float, str, bool]] = []  # end, kind, operator; outermost first
    now = 0.0

    def advance(time: float) -> None:
        nonlocal now
        while open_events and now < time:
            end, kind, operator = open_events[-1]
            until = min(end, time)
            if until > now:
                pieces.append(Piece(now, until, kind, operator))
                now = until
            if end <= time:
                open_events.pop()
        now = time

    for event in events:
        begin, end = event["ts"], event["ts"] + event["dur"]
        advance(begin)
        while open_events and open_events[-1][0] <= begin:
            open_events.pop()
        outer = open_events[-1][1] if open_events else OTHER
        own = kind_of(event["name"])
        kind = own if own and (outer not in CLOSED or own == COLLECTIVES) else outer
        if open_events:
            end = min(end, open_events[-1][0])  # clock reads: an inner event may seem to end late
        open_events.append((end, kind, bool(OPERATOR.match(event["name"]))))
        if "External id" in (arguments := event.get("args", {})):
            kinds[arguments["External id"]] = kind
    advance(float("inf"))
    return pieces


def _in_flight(events: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """Stretches of time in which a thread of gloo was in a collective."""
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["name"].startswith("gloo:")]
    return _union(spans)


def _of_host(pieces: Sequence[Piece], in_flight: Sequence[tuple[float, float]]) -> dict[str, float]:
    """Microseconds by kind on a CPU.

    Python outside of operators waits for a collective that is under way. Python right after the
    start of a collective waits too: gloo's thread is still waking up.
    """
    spent: dict[str, float] = defaultdict(float)
    begun = False
    for piece in pieces:
        length = piece.end - piece.begin
        waited = 0.0
        if not piece.operator and piece.kind != COLLECTIVES:
            waited = length if begun else _overlap(in_flight, piece.begin, piece.end)
        begun = piece.operator and piece.kind == COLLECTIVES
        spent[COLLECTIVES] += waited
        spent[piece.kind] += length - waited
    return spent


def _on_device(kernel: dict[str, Any], operators: dict[int, str]) -> Piece:
    own = kind_of(kernel["name"])
    launched_by = operators.get(kernel.get("args", {}).get("External id"), OTHER)
    kind = COLLECTIVES if own == COLLECTIVES else launched_by
    return Piece(kernel["ts"], kernel["ts"] + kernel["dur"], kind, True)


def _of_device(
    kernels: Iterable[Piece], host: Sequence[Piece], begin: float, end: float
) -> dict[str, float]:
    """Microseconds by kind between two moments; without a kernel, data wait or device idle."""
    spent: dict[str, float] = defaultdict(float)
    spans = sorted(
        (max(k.begin, begin), min(k.end, end), k.kind)
        for k in kernels
        if k.begin < end and k.end > begin
    )
    computing = _claim([s for s in spans if s[2] != COLLECTIVES], [], spent)
    busy = _claim([s for s in spans if s[2] == COLLECTIVES], computing, spent)
    waits = _union([(p.begin, p.end) for p in host if p.kind == DATA])
    idle = (end - begin) - sum(b - a for a, b in busy)
    waiting = sum(b - a - _overlap(busy, a, b) for a, b in waits)
    spent[DATA] += waiting
    spent[IDLE] += idle - waiting
    return spent


def _claim(
    spans: Iterable[tuple[float, float, str]],
    taken: list[tuple[float, float]],
    spent: dict[str, float],
) -> list[tuple[float, float]]:
    """Adds each span's time outside of `taken` to its kind; returns all taken stretches."""
    last = float("-inf")
    for begin, end, kind in spans:
        begin = max(begin, last)
        if end > begin:
            spent[kind] += end - begin - _overlap(taken, begin, end)
            last = end
    return _union([*taken, *((begin, end) for begin, end, _ in spans)])


def _union(spans: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _overlap(spans: Sequence[tuple[float, float]], begin: float, end: float) -> float:
    """Length that ascending, separate `spans` share with a stretch of time."""
    first = max(0, bisect.bisect_right(spans, (begin, float("inf"))) - 1)
    shared = 0.0
    for a, b in spans[first:]:
        if a >= end:
            break
        shared += max(0.0, min(b, end) - max(a, begin))
    return shared
