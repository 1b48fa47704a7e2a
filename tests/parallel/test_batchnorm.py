"""Grouped SyncBatchNorm against one torch BatchNorm over the whole group's batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from seer_scale.parallel.batchnorm import (
    GroupedSyncBatchNorm,
    average_running_statistics,
    convert_sync_batchnorm,
)

Distributed = Callable[..., list[Any]]
ROWS = {1: [7], 2: [5, 2], 4: [3, 1, 4, 2]}  # uneven on purpose


def batch(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 3, 4, 5, generator=generator, dtype=torch.float64) * 3 + 100
    return x.to(dtype), torch.randn(x.shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(dtype: torch.dtype) -> nn.Sequential:
    norm = nn.BatchNorm2d(3, dtype=dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([-1.0, 0.0, 3.0]))
    return nn.Sequential(norm)


def run(model: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad)
    return {
        "y": y.detach(),
        "x.grad": x.grad,
        **{f"{name}.grad": p.grad for name, p in model.named_parameters()},
        **{name: b.clone() for name, b in model.named_buffers()},
    }


def sharded(group_size: int, rows: list[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x, grad = batch(dtype)
    first = sum(rows[: dist.get_rank()])
    mine = slice(first, first + rows[dist.get_rank()])
    return run(convert_sync_batchnorm(layer(dtype), group_size), x[mine], grad[mine])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_global_group_equals_one_big_batchnorm(
    distributed: Distributed, world_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    # float32: the inputs sit at 100 +- 3 with weights up to 2, and sums over 200 values of 1e2
    # carry 1e-5 relative, which is what the wide tolerance covers; float64 shows the formula.
    rows = ROWS[world_size]
    ranks = distributed(sharded, world_size, 0, rows, dtype)
    x, grad = batch(dtype)
    expected = run(layer(dtype), x[: sum(rows)], grad[: sum(rows)])
    for key in ("y", "x.grad"):
        whole = torch.cat([rank[key] for rank in ranks])
        torch.testing.assert_close(whole, expected[key], rtol=tolerance, atol=tolerance)
    for key in ("0.weight.grad", "0.bias.grad"):  # local: the engine adds them up
        total = sum(rank[key] for rank in ranks)
        torch.testing.assert_close(total, expected[key], rtol=tolerance, atol=tolerance)
    for rank in ranks:
        for key in ("0.running_mean", "0.running_var", "0.num_batches_tracked"):
            torch.testing.assert_close(rank[key], expected[key], rtol=1e-6, atol=0)


def test_groups_of_two_share_inside_and_differ_across(distributed: Distributed) -> None:
    rows = ROWS[4]
    ranks = distributed(sharded, 4, 2, rows, torch.float64)
    x, grad = batch()
    for group, mine in enumerate([slice(0, 4), slice(4, 10)]):
        expected = run(layer(torch.float64), x[mine], grad[mine])
        members = ranks[2 * group : 2 * group + 2]
        for key in ("y", "x.grad"):
            torch.testing.assert_close(torch.cat([m[key] for m in members]), expected[key])
        for member in members:
            torch.testing.assert_close(member["0.running_var"], expected["0.running_var"])
    assert not torch.allclose(ranks[0]["0.running_mean"], ranks[2]["0.running_mean"])


def test_last_group_may_be_smaller(distributed: Distributed) -> None:
    rows = ROWS[4]
    ranks = distributed(sharded, 4, 3, rows, torch.float64)
    x, grad = batch()
    expected = run(layer(torch.float64), x[8:], grad[8:])  # rank 3 is a group of its own
    torch.testing.assert_close(ranks[3]["x.grad"], expected["x.grad"])


def averaged_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = batch()
    model = convert_sync_batchnorm(layer(torch.float64), 1)
    model(x[dist.get_rank() * 5 : (dist.get_rank() + 1) * 5])
    before = model[0].running_mean.clone()
    average_running_statistics(model)
    return before, model[0].running_mean


def test_running_statistics_are_averaged_over_groups(distributed: Distributed) -> None:
    (before0, after0), (before1, after1) = distributed(averaged_statistics, 2)
    assert not torch.allclose(before0, before1)
    torch.testing.assert_close(after0, (before0 + before1) / 2)
    torch.testing.assert_close(after1, after0)


def low_precision() -> dict[str, torch.Tensor]:
    x, grad = batch(torch.bfloat16)
    mine = slice(dist.get_rank() * 5, (dist.get_rank() + 1) * 5)
    return run(convert_sync_batchnorm(layer(torch.float32), 0), x[mine], grad[mine])


def test_statistics_are_float32_under_low_precision(distributed: Distributed) -> None:
    ranks = distributed(low_precision, 2)
    x, grad = batch(torch.bfloat16)
    expected = run(layer(torch.float64), x.double(), grad.double())
    for rank in ranks:
        assert rank["y"].dtype == torch.bfloat16
        assert rank["0.running_var"].dtype == torch.float32
        for key in ("0.running_mean", "0.running_var"):  # of the bf16 values, in float32
            torch.testing.assert_close(rank[key].double(), expected[key], rtol=1e-5, atol=0)
    y = torch.cat([rank["y"] for rank in ranks]).double()
    torch.testing.assert_close(y, expected["y"], rtol=1e-2, atol=1e-2)  # bf16 has 8 bits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)))


def two_resolutions(mode: str, group_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = convert_sync_batchnorm(nn.Sequential(*[Block() for _ in range(4)]), group_size)
    apply_activation_checkpointing([list(model)], mode, [[1]] if mode == "groups" else None)
    calls = 0
    reduce = dist.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    dist.all_reduce = counted
    try:
        for _ in range(3):
            loss = model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean()
            loss = loss + model(torch.randn(6, 3, 4, 4, generator=generator)).square().mean()
            loss.backward()
    finally:
        dist.all_reduce = reduce
    return {
        "loss": loss.detach(),
        "collectives": torch.tensor(calls),
        **{name: p.grad for name, p in model.named_parameters()},
        **dict(model.named_buffers()),
    }


@pytest.mark.parametrize("group_size", [0, 1])
@pytest.mark.parametrize("mode", ["full", "groups"])
def test_recompute_updates_nothing_and_communicates_nothing(
    distributed: Distributed, mode: str, group_size: int
) -> None:
    plain = distributed(two_resolutions, 2, "none", group_size)[0]
    recomputed = distributed(two_resolutions, 2, mode, group_size)[0]
    assert int(plain["0.norm.num_batches_tracked"]) == 6
    # 4 layers x 2 resolutions x 3 steps, one forward and one backward each
    assert int(plain["collectives"]) == (48 if group_size == 0 else 0)
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, rtol=0, atol=0, msg=key)


def test_conversion_keeps_names_values_and_meta() -> None:
    model = layer(torch.float32)
    names = list(model.state_dict())
    converted = convert_sync_batchnorm(model, 0)
    assert isinstance(converted[0], GroupedSyncBatchNorm)
    assert list(converted.state_dict()) == names
    assert torch.equal(converted[0].weight, torch.tensor([0.5, 1.0, 2.0]))
    on_meta = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4, device="meta")), 0)
    assert all(tensor.is_meta for tensor in on_meta.state_dict().values())


@pytest.mark.parametrize("shape", [(6, 3), (6, 3, 4, 4)])
def test_alone_equals_torch_in_low_precision(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16()
    reference = nn.BatchNorm2d(3) if len(shape) == 4 else nn.BatchNorm1d(3)
    ours = GroupedSyncBatchNorm(3)
    assert torch.equal(ours(x), reference(x))
    assert ours.running_var.dtype == torch.float32
    assert torch.equal(ours.running_var, reference.running_var)
    ours.eval(), reference.eval()
    assert torch.equal(ours(x), reference(x))
