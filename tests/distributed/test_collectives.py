"""Collectives with and without a process group; the gather's gradient against one process."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from harness.pool import Distributed
from seer_scale import distributed as ranks
from seer_scale.distributed import collectives as module
from seer_scale.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


def test_without_a_group_everything_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not dist.is_initialized()
    tensor = torch.arange(6.0).view(3, 2)
    assert (ranks.rank(), ranks.world_size(), ranks.local_rank()) == (0, 1, 0)
    assert (ranks.local_world_size(), ranks.nodes(), ranks.is_main()) == (1, 1.0, True)
    assert ranks.all_reduce(tensor) is tensor
    assert torch.equal(tensor, torch.arange(6.0).view(3, 2))
    assert ranks.all_gather(tensor) is tensor
    assert ranks.all_gather_with_gradient(tensor) is tensor
    assert ranks.broadcast_object("run") == "run"
    assert ranks.gather_lists([1, 2]) == [1, 2]
    ranks.barrier()


def collectives() -> dict[str, Any]:
    mine = torch.tensor([1.0, -1.0]) * (ranks.rank() + 1)
    total = mine.clone()
    returned = ranks.all_reduce(total)
    return {
        "who": (ranks.rank(), ranks.world_size(), ranks.is_main()),
        "in_place": returned is total,
        "sum": total.tolist(),
        "max": ranks.all_reduce(mine.clone(), "max").tolist(),
        "gathered": ranks.all_gather(torch.full((2, 1), ranks.rank())).flatten().tolist(),
        "strided": ranks.all_gather(torch.arange(4).view(2, 2).T + 10 * ranks.rank()).tolist(),
        "broadcast": ranks.broadcast_object({"id": ranks.rank()}),
        "lists": ranks.gather_lists([(ranks.rank(), i) for i in range(ranks.rank())]),
    }


class _Waits(TorchDispatchMode):
    """Counts reads of a device by the host, as they would be if tensors were on one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def gathered_lists() -> list[Any]:
    # Lists of unequal length, an empty one too.
    return ranks.gather_lists([(ranks.rank(), "x" * 3000)] * ranks.rank())


def waits_of_a_gather() -> int:
    copies = 0
    cpu = Tensor.cpu

    def counted(self: Tensor) -> Tensor:
        nonlocal copies
        copies += 1
        return cpu(self)

    Tensor.cpu = counted  # type: ignore[method-assign, assignment]
    try:
        with _Waits() as waits:
            ranks.gather_lists(["broken.jpg"])
    finally:
        Tensor.cpu = cpu  # type: ignore[method-assign]
    return int(copies + waits.count)


def test_lists_of_any_length_are_joined(distributed: Distributed) -> None:
    expected = [(rank, "x" * 3000) for rank in range(4) for _ in range(rank)]
    assert distributed(gathered_lists, 4) == [expected] * 4


def test_a_gather_of_lists_waits_twice_however_many_ranks(distributed: Distributed) -> None:
    # One bad image of 512 ranks once cost about 1,500 waits.
    for world_size in (2, 4):
        assert distributed(waits_of_a_gather, world_size) == [2] * world_size


def test_collectives_on_four_ranks(distributed: Distributed) -> None:
    strided = [row for r in range(4) for row in ([10 * r, 10 * r + 2], [10 * r + 1, 10 * r + 3])]
    for rank, result in enumerate(distributed(collectives, 4)):
        assert result == {
            "who": (rank, 4, rank == 0),
            "in_place": True,
            "sum": [10.0, -10.0],
            "max": [4.0, -1.0],
            "gathered": [0, 0, 1, 1, 2, 2, 3, 3],
            "strided": strided,
            "broadcast": {"id": 0},
            "lists": [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)],
        }


def within_pairs() -> tuple[float, list[int], int]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    pair = pairs[ranks.rank() // 2]
    assert isinstance(pair, dist.ProcessGroup)
    total = ranks.all_reduce(torch.tensor([float(ranks.rank())]), "sum", pair)
    gathered = ranks.all_gather(torch.tensor([ranks.rank()]), pair)
    return float(total), gathered.tolist(), ranks.world_size(pair)


def test_collectives_stay_within_their_group(distributed: Distributed) -> None:
    first, second = (1.0, [0, 1], 2), (5.0, [2, 3], 2)
    assert distributed(within_pairs, 4) == [first, first, second, second]


def contrastive(rows: Tensor, everyone: Tensor, first: int) -> Tensor:
    """A loss in which every row meets every other: the mean over `rows`."""
    logits = torch.tanh(rows @ everyone.T) * 3
    return torch.nn.functional.cross_entropy(logits, torch.arange(first, first + len(rows)))


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 5, generator=generator, dtype=torch.float64)
    return images, torch.randn(5, 3, generator=generator, dtype=torch.float64)


def gradients(size: int) -> tuple[Tensor, Tensor]:
    """Weight gradient averaged over the group's ranks, and the gradient of this rank's rows."""
    groups = [dist.new_group(list(range(f, f + size))) for f in range(0, ranks.world_size(), size)]
    group = groups[ranks.rank() // size]
    assert isinstance(group, dist.ProcessGroup)
    index = dist.get_rank(group)
    images, weight = data()
    weight.requires_grad_()
    rows = len(images) // size
    mine = images[index * rows : (index + 1) * rows] @ weight
    mine.retain_grad()
    everyone = ranks.all_gather_with_gradient(mine, group)
    contrastive(mine, everyone, index * rows).backward()
    assert weight.grad is not None
    assert mine.grad is not None
    return ranks.all_reduce(weight.grad, "sum", group) / size, mine.grad / size


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 4), (4, 2)])
def test_gradient_through_the_gather_is_that_of_one_process(
    distributed: Distributed, world_size: int, size: int
) -> None:
    images, weight = data()
    weight.requires_grad_()
    rows = images @ weight
    rows.retain_grad()
    contrastive(rows, rows, 0).backward()
    results = distributed(gradients, world_size, size)
    for weight_grad, _ in results:
        torch.testing.assert_close(weight_grad, weight.grad, rtol=1e-12, atol=1e-14)
    for first in range(0, world_size, size):
        whole = torch.cat([rows_grad for _, rows_grad in results[first : first + size]])
        torch.testing.assert_close(whole, rows.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("environment", "ranks_here"),
    [({"LOCAL_WORLD_SIZE": "4"}, 4), ({"LOCAL_SIZE": "2"}, 2), ({}, 1)],
)
def test_ranks_of_this_node_are_what_the_launcher_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], ranks_here: int
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.local_world_size() == ranks_here


def refused_as_one_of_two_unequal_nodes() -> str:
    known = os.environ["LOCAL_WORLD_SIZE"]
    os.environ["LOCAL_WORLD_SIZE"] = str(2 + ranks.rank())
    try:
        ranks.init()
    except ConfigError as error:
        return str(error)
    finally:
        os.environ["LOCAL_WORLD_SIZE"] = known
    return "not refused"


def test_nodes_with_different_numbers_of_ranks_are_refused_on_every_rank(
    distributed: Distributed,
) -> None:
    for sentence in distributed(refused_as_one_of_two_unequal_nodes, 2):
        assert "nodes have different numbers of ranks ([2, 3])" in sentence


PLAIN = """
import os, torch, torch.distributed as dist
from seer_scale import distributed
device = distributed.init()
assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
assert dist.is_initialized() and (distributed.rank(), distributed.world_size()) == (0, 1)
cores = len(os.sched_getaffinity(0))
if device.type == "cpu":
    assert torch.get_num_threads() == max(1, cores // 2), torch.get_num_threads()
assert distributed.init() == device  # a second call joins nothing
group = dist.new_group([0])
assert distributed.all_reduce(torch.ones(1, device=device), "sum", group).item() == 1
distributed.shutdown()
distributed.shutdown()
assert not dist.is_initialized()
"""


def test_a_plain_run_is_a_group_of_one_that_shares_the_cores() -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RANK")}
    environment |= {"LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 8),  # plain python: all cores are its
        ({"LOCAL_SIZE": "2"}, 4),  # deepspeed
        ({"LOCAL_SIZE": "16"}, 1),
        ({"LOCAL_SIZE": "2", "OMP_NUM_THREADS": "4"}, None),  # deepspeed --bind_cores_to_rank
        ({"OMP_NUM_THREADS": "1"}, None),
        # torchrun says 1 where nobody has said anything, and only for several ranks.
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, 4),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, None),
    ],
)
def test_cores_are_divided_among_the_ranks_of_a_node(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int | None
) -> None:
    for name in ("OMP_NUM_THREADS", "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "physical_cores", lambda: 8)
    assert ranks.threads_of_a_rank() == expected


def test_physical_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.sched_getaffinity(0)
    assert 1 <= ranks.physical_cores() <= len(allowed)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {min(allowed)})
    assert ranks.physical_cores() == 1


THREADS = """
import torch
from seer_scale import distributed
distributed.init(threads=THREADS)
print(f"threads {torch.get_num_threads()}")
distributed.shutdown()
"""


ON_A_GPU = """
import torch
from seer_scale import distributed
torch.cuda.is_available = lambda: True
torch.cuda.set_device = lambda device: print(device)
torch.distributed.is_nccl_available = lambda: False
distributed.init(threads=3)
print(torch.get_num_threads())
"""


def test_a_rank_with_a_gpu_has_its_threads_too() -> None:
    """For what the host computes: offloaded momentum, the kNN of an evaluation."""
    done = subprocess.run(
        [sys.executable, "-c", ON_A_GPU],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["cuda:0", "3"]


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("threads", [None, 3])
def test_torchrun_s_default_is_not_taken_for_the_user_s(
    tmp_path: Path, threads: int | None
) -> None:
    script = tmp_path / "threads.py"
    script.write_text(THREADS.replace("THREADS", str(threads)))
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script)],
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "PYTHONPATH": str(ROOT)},
    )
    share = max(1, ranks.physical_cores() // 2)
    # Both ranks write to one pipe, and a line's end may come after the other's line.
    assert re.findall(r"threads \d+", done.stdout) == [f"threads {threads or share}"] * 2
