"""Process group, ranks and the few collectives that the project needs.

Every function also works without a process group, so that models, objectives and the optimizer
run unchanged in a plain Python process.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from seer_scale.distributed import flight_recorder
from seer_scale.distributed.gpus import backend_of
from seer_scale.distributed.work_clock import CLOCK
from seer_scale.errors import ConfigError

# Its name before torch 2.14, where this one is deprecated.
_GATHER: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def init(timeout_minutes: float = 30.0, threads: int | None = None) -> torch.device:
    """Joins the process group that deepspeed or torchrun describe in the environment.

    A plain `python` run becomes a group of one.

    Args:
        timeout_minutes: time that a collective may take, in this and every later process group.
        threads: CPU threads of a rank; None means `threads_of_a_rank()`.

    Returns:
        this rank's device.

    Raises:
        ConfigError: if nodes have different numbers of ranks, another program has the port, or
            torch has no NCCL for GPUs.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # On a GPU too: offloaded momentum and the kNN of an evaluation are the host's work.
    if count := threads or threads_of_a_rank():
        torch.set_num_threads(count)
    timeout = timedelta(minutes=timeout_minutes)
    _give_to_later_groups(timeout)
    flight_recorder.switch_on()
    if not dist.is_initialized():
        if "WORLD_SIZE" in os.environ:
            store, own_rank, ranks = _rendezvous(timeout)
            # torchrun's store survives a restart, with the addresses of ranks that are gone. Each
            # node counts its own restarts, so the count is common to all ranks on one node only.
            alone = local_world_size() == ranks
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if alone else "0"
            store = PrefixStore(f"attempt_{attempt}", store)
        else:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed needs it
            store, own_rank, ranks = HashStore(), 0, 1
        backend = backend_of(cuda=cuda, ranks=ranks)
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


def _give_to_later_groups(timeout: timedelta) -> None:
    """Makes `timeout` the default of process groups: of meshes, of BatchNorm and of DeepSpeed.

    torch's own default for NCCL is 10 minutes. It would abort a rank that waits for another one's
    images before the watchdog has named the missing rank. DeepSpeed passes no timeout to its
    groups, so that the default is the one place that holds for all.
    """
    c10d: Any = dist.distributed_c10d
    c10d.default_pg_timeout = timeout
    c10d.default_pg_nccl_timeout = timeout


def _rendezvous(timeout: timedelta) -> tuple[Store, int, int]:
    """Meets the other ranks at MASTER_PORT; returns the store, this rank and the world's size.

    Raises:
        ConfigError: another program listens at the port.
    """
    try:
        found: tuple[Store, int, int] = next(rendezvous("env://", timeout=timeout))
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        port = os.environ["MASTER_PORT"]
        raise ConfigError(
            f"port {port} of this machine is in use, most likely by another run: give this run a "
            "port of its own, deepspeed --master_port PORT ..., or torchrun --master-port PORT ..."
        ) from None
    return found


def shutdown() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Rank in the world; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Number of ranks in `group` (the world unless given); 1 without a process group."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def local_rank() -> int:
    """Rank on this node, from the launcher's environment; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    """Number of ranks on this node: LOCAL_WORLD_SIZE of torchrun, LOCAL_SIZE of deepspeed."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size())


def threads_of_a_rank() -> int | None:
    """Computes this rank's share of the physical cores; None if the user set OMP_NUM_THREADS.

    More threads than that share make every rank slower. torchrun sets OMP_NUM_THREADS=1 if the
    variable is unset and a node has several ranks, which would leave the other cores idle. The
    value 1 under torchrun therefore counts as torchrun's, not as the user's.
    """
    decided, ranks = os.environ.get("OMP_NUM_THREADS"), local_world_size()
    by_torchrun = decided == "1" and ranks > 1 and "TORCHELASTIC_RUN_ID" in os.environ
    if decided is not None and not by_torchrun:
        return None
    return max(1, physical_cores() // ranks)


def physical_cores() -> int:
    """Counts the cores that this process may run on; two hardware threads of a core count once."""
    cores = set()
    for cpu in os.sched_getaffinity(0):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        cores.add(siblings.read_text() if siblings.exists() else str(cpu))
    return len(cores)


def nodes() -> float:
    """Number of machines of the run, if all have as many ranks as this one; known before `init`."""
    ranks = world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))
    return ranks / local_world_size()


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
    """Reduces `tensor` of any shape in place over `group` (None: the world) and returns it."""
    if world_size(group) > 1:
        kind = dist.ReduceOp.MAX if op == "max" else dist.ReduceOp.SUM
        # NCCL takes tensors on GPUs only, and ZeRO's offload has norms on the host.
        on_host = tensor.device.type == "cpu" and dist.get_backend(group) == "nccl"
        sent = tensor.cuda() if on_host else tensor
        _off_the_clock(dist.all_reduce, sent, kind, group)
        if on_host:
            tensor.copy_(sent)
    return tensor


def all_gather(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Concatenates the `tensor` [n, ...] of every rank, of equal shapes, to [ranks * n, ...]."""
    if world_size(group) == 1:
        return tensor
    gathered = tensor.new_empty((world_size(group) * tensor.shape[0], *tensor.shape[1:]))
    _off_the_clock(_GATHER, gathered, tensor.contiguous(), group)
    return gathered


def _off_the_clock(collective: Callable[..., Any], *args: Any) -> None:
    """Runs a collective; the time inside is excluded from the work clock."""
    if torch.compiler.is_compiling() or not CLOCK.running:
        collective(*args)
        return
    CLOCK.mark()
    collective(*args)
    CLOCK.mark()


def broadcast_object(value: Any) -> Any:
    """Sends rank 0's `value` to every rank and returns it."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_lists(items: list[Any]) -> list[Any]:
    """Joins the lists of all ranks, in rank order, on every rank.

    The host waits twice, at any number of ranks; torch's `all_gather_object` waits about three
    times per rank when ranks have GPUs.
    """
    if world_size() == 1:
        return items
    on_gpu = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    mine = torch.frombuffer(bytearray(pickle.dumps(items)), dtype=torch.uint8)
    lengths = all_gather(torch.tensor([len(mine)], device=device)).cpu().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(mine)] = mine
    rows = all_gather(padded.to(device)).cpu().view(world_size(), -1).numpy()
    lists = [pickle.loads(row[:n].tobytes()) for row, n in zip(rows, lengths, strict=True)]
    return [item for part in lists for item in part]


class _AllGather(torch.autograd.Function):
    """all_gather whose backward pass sums, over ranks, the gradients of this rank's rows."""

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
    """Gathers `tensor` [n, ...] as `all_gather` does; gradients flow back to each row's own rank.

    With a loss averaged over ranks, as in data-parallel training, the gradients equal those of one
    process that computes the mean loss on the whole batch.
    """
    if world_size(group) == 1:
        return tensor
    gathered: Tensor = _AllGather.apply(tensor, group)
    return gathered
