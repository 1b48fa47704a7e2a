"""Process group, ranks and the few collectives that the rest needs.

Every function also works without a process group, so that models, objectives and the optimizer
run unchanged in a plain Python process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore
from torch.distributed.rendezvous import rendezvous

from seer_scale.distributed.work_clock import CLOCK
from seer_scale.errors import ConfigError


def init(timeout_minutes: float = 30.0, threads: int | None = None) -> torch.device:
    """Joins the process group that deepspeed or torchrun describe in the environment.

    A plain `python` run becomes a group of one. Returns this rank's device.

    Args:
        timeout_minutes: that a collective may take.
        threads: of a rank on a CPU; see `threads_of_a_rank` for None.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    elif count := threads or threads_of_a_rank():
        torch.set_num_threads(count)
    if not dist.is_initialized():
        backend, timeout = "nccl" if cuda else "gloo", timedelta(minutes=timeout_minutes)
        if "WORLD_SIZE" in os.environ:
            store, own_rank, ranks = next(rendezvous("env://", timeout=timeout))
            # torchrun's store outlives a restart, with the addresses of ranks that are gone. Nodes
            # count restarts each for itself, so only one node's count is everybody's.
            alone = local_world_size() == ranks
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
            store = PrefixStore(f"attempt_{attempt}", store)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
            store, own_rank, ranks = HashStore(), 0, 1
        dist.init_process_group(
            backend, timeout=timeout, store=store, rank=own_rank, world_size=ranks
        )
    sizes = gather_lists([local_world_size()])
    if len(set(sizes)) > 1:
        raise ConfigError(
            f"nodes have different numbers of ranks ({sorted(set(sizes))}): the learning rate and "
            "BatchNorm groups of a node need the same number on each"
        )
    return device


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Rank in the world; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in `group` (the world unless given); 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank on this node, as the launcher says; 0 without one."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Ranks on this node: torchrun says LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def threads_of_a_rank() -> int | None:
    """This rank's share of the physical cores; None where OMP_NUM_THREADS has decided.

    Threads beyond that share make every rank slower. torchrun sets OMP_NUM_THREADS=1 where nobody
    else has and a node has several ranks, which would leave the other cores idle; that value is
    taken for its, not for the user's.
    """
    decided, ranks = os.environ.get("OMP_NUM_THREADS"), local_world_size()
    by_torchrun = decided == "1" and ranks > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if decided is not None and not by_torchrun:
        return None
    return max(1, physical_cores() // ranks)


def physical_cores() -> int:
    """Cores that this process may run on; two hardware threads of a core count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(cores)


def nodes() -> float:
    """Machines in the world, taking all to have as many ranks as this one."""
    return world_size() / local_world_size()


def is_main() -> bool:
    """Whether this is rank 0, which alone writes files and talks to the tracker."""
    return rank() == 0


def barrier() -> None:
    """Waits for every rank."""
    if world_size() > 1:
        dist.barrier()


def all_reduce(
    tensor: Tensor, op: Literal["sum", "max"] = "sum", group: dist.ProcessGroup | None = None
) -> Tensor:
    """Reduces `tensor` in place over `group` and returns it."""
    if world_size(group) > 1:
        kind = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        # NCCL knows GPUs only, and ZeRO's offload has norms on the host.
        on_host = tensor.device.type == "cpu" and dist.get_backend(group) == "nccl"
        sent = tensor.cuda() if on_host else tensor
        _off_the_clock(dist.all_reduce, sent, kind, group)
        if on_host:
            tensor.copy_(sent)
    return tensor


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenates every rank's `tensor` (equal shapes) along the first axis, in rank order."""
    if world_size(group) == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size(group))]
    _off_the_clock(dist.all_gather, parts, tensor.contiguous(), group)
    return torch.cat(parts)


def _off_the_clock(collective: Callable[..., Any], *args: Any) -> None:
    """Waiting for others is no work of this rank's."""
    if torch.compiler.is_compiling() or not CLOCK.running:
        collective(*args)
        return
    CLOCK.mark()
    collective(*args)
    CLOCK.mark()


def broadcast_object(value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_lists(items: list[Any]) -> list[Any]:
    """The items of every rank's list, in rank order, on every rank."""
    if world_size() == 1:
        return items
    lists: list[list[Any]] = [[] for _ in range(world_size())]
    dist.all_gather_object(lists, items)
    return [item for part in lists for item in part]


class _AllGather(torch.autograd.Function):
    """all_gather whose backward sums over ranks what each of them asks of this rank's rows."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
        ctx.group, ctx.rows = group, tensor.shape[0]
        return all_gather(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        total = all_reduce(grads[0].contiguous().clone(), "sum", ctx.group)
        index = dist.get_rank(ctx.group)
        return total[index * ctx.rows : (index + 1) * ctx.rows], None


def all_gather_with_gradient(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """`all_gather` through which gradients flow back to the rank that owns each row.

    With a loss averaged over ranks (as data-parallel training does) the gradients equal those of
    one process that computes the mean loss on the whole batch.
    """
    if world_size(group) == 1:
        return tensor
    gathered: Tensor = _AllGather.apply(tensor, group)
    return gathered
