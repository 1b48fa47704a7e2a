"""Grouped SyncBatchNorm against one torch BatchNorm over the whole group's batch."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from harness.gpu_kernels import with_gpu_kernels
from harness.pool import Distributed
from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm
from seer_scale.parallel.batchnorm_gpu import in_32_bits
from seer_scale.parallel.compile import apply_compile
from seer_scale.parallel.convert_batchnorm import average_running_statistics, convert_sync_batchnorm

# The largest group that gathers statistics with the kernels of GPUs; None: every device's kernels.
KERNELS = {"every device": None, "GPU, gathered": 4, "GPU, summed": 1}
ROWS = {1: [7], 2: [5, 2], 4: [3, 1, 4, 2]}  # uneven on purpose


@pytest.fixture(params=list(KERNELS.values()), ids=list(KERNELS))
def ranks_of(request: pytest.FixtureRequest, distributed: Distributed) -> Distributed:
    """Runs a function on ranks, with either set of kernels."""
    if request.param is None:
        return distributed

    def run(function: Any, world_size: int, *args: Any) -> Any:
        return distributed(with_gpu_kernels, world_size, request.param, function, *args)

    return run


@contextmanager
def collectives() -> Iterator[Counter[str]]:
    """Counts this rank's collectives, by whichever way they are called, once the block ends."""
    count: Counter[str] = Counter()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield count
    names = ("c10d::allreduce_", "c10d::_allgather_base_")
    count.update(e.name for e in profile.events() if e.name in names)


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


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        found[name] = parameter.grad
    return found


def sharded(group_size: int, rows: list[int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x, grad = batch(dtype)
    first = sum(rows[: dist.get_rank()])
    mine = slice(first, first + rows[dist.get_rank()])
    return run(convert_sync_batchnorm(layer(dtype), group_size), x[mine], grad[mine])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
@pytest.mark.parametrize("world_size", [2, 4])
def test_global_group_equals_one_big_batchnorm(
    ranks_of: Distributed, world_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    # float32: the inputs sit at 100 +- 3 with weights up to 2, and sums over 200 values of 1e2
    # carry 1e-5 relative, which is what the wide tolerance covers; float64 shows the formula.
    rows = ROWS[world_size]
    ranks = ranks_of(sharded, world_size, 0, rows, dtype)
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


def test_groups_of_two_share_inside_and_differ_across(ranks_of: Distributed) -> None:
    rows = ROWS[4]
    ranks = ranks_of(sharded, 4, 2, rows, torch.float64)
    x, grad = batch()
    for group, mine in enumerate([slice(0, 4), slice(4, 10)]):
        expected = run(layer(torch.float64), x[mine], grad[mine])
        members = ranks[2 * group : 2 * group + 2]
        for key in ("y", "x.grad"):
            torch.testing.assert_close(torch.cat([m[key] for m in members]), expected[key])
        for member in members:
            torch.testing.assert_close(member["0.running_var"], expected["0.running_var"])
    assert not torch.allclose(ranks[0]["0.running_mean"], ranks[2]["0.running_mean"])


def test_last_group_may_be_smaller(ranks_of: Distributed) -> None:
    rows = ROWS[4]
    ranks = ranks_of(sharded, 4, 3, rows, torch.float64)
    x, grad = batch()
    for members, mine in ((ranks[:3], slice(0, 8)), (ranks[3:], slice(8, 10))):
        expected = run(layer(torch.float64), x[mine], grad[mine])
        for key in ("y", "x.grad"):
            torch.testing.assert_close(torch.cat([m[key] for m in members]), expected[key])
        for member in members:
            torch.testing.assert_close(member["0.running_var"], expected["0.running_var"])


class Calls(TorchDispatchMode):
    """Counts calls into ATen and c10d; holds the backward kernel to what CUDA's asserts."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.names.append(str(function))
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.native_batch_norm_backward.default:
            grad, x, weight, mean, variance, saved_mean, saved_invstd, train, eps, mask = args
            assert saved_mean is not None
            assert saved_invstd is not None
            assert torch.equal(saved_mean, mean)
            assert torch.equal(saved_invstd, (variance + eps).rsqrt())
            without = function(grad, x, weight, mean, variance, None, None, train, eps, mask)
            for number, wanted in enumerate(mask):
                assert not wanted or torch.equal(result[number], without[number])
        return result


def layouts() -> list[tuple[list[str], list[str]]]:
    """Calls of a forward and a backward pass, for each layout that CUDA's kernels tell apart."""
    found = []
    whole = torch.randn(6, 3, 4, 4)
    channels_last = whole.to(memory_format=torch.channels_last)
    for x in (whole, channels_last, whole[:, :, 0, 0].contiguous(), whole[:, :, :1, :1]):
        norm = nn.BatchNorm2d(3) if x.dim() == 4 else nn.BatchNorm1d(3)
        model = convert_sync_batchnorm(nn.Sequential(norm), 0)
        start = x.clone().requires_grad_()
        with Calls() as forward:
            y = model(start)
        grad = torch.randn_like(y)
        with Calls() as backward:
            y.backward(grad)
        found.append((forward.names, backward.names))
    return found


def own(names: list[str]) -> list[str]:
    """Calls that are neither views nor autograd's sums of gradients."""
    others = ("split_with_sizes", "unbind", "view", "detach")  # detach: a first gradient
    return [name for name in names if not any(other in name for other in others)]


def test_backward_passes_saved_statistics_in_every_layout_and_few_calls(
    distributed: Distributed,
) -> None:
    # The host's time of a step at scale is these calls. They were 37 and 23, of which 29 and 18 are
    # `own`.
    for rank in distributed(layouts, 2):
        for forward, backward in rank:
            assert "aten.native_batch_norm_backward.default" in backward
            assert len(forward) <= 19, forward
            assert len(backward) <= 13, backward
            assert len(own(forward)) <= 16, forward
            assert len(own(backward)) <= 8, backward


@pytest.mark.parametrize(("most_gathered", "forward_calls"), [(2, 9), (1, 18)])
def test_calls_with_the_kernels_of_gpus(
    distributed: Distributed, most_gathered: int, forward_calls: int
) -> None:
    for rank in distributed(with_gpu_kernels, 2, most_gathered, layouts):
        for forward, backward in rank:
            assert len(own(forward)) <= forward_calls, forward
            assert len(own(backward)) <= 4, backward


@pytest.mark.parametrize(("ranks", "error"), [(2, 0), (5_000, 1e-8), (16_384, 1e-8)])
def test_counts_of_large_groups_fit_in_32_bits(ranks: int, error: float) -> None:
    of_a_rank = 32 * 112**2
    total = ranks * of_a_rank
    counts = in_32_bits(torch.tensor([-total], dtype=torch.float64), total)
    assert counts.dtype == torch.int32
    assert min(counts) > 0
    assert int(counts.long().sum()) == pytest.approx(total, rel=error)


def groups_of_three_models(group_size: int) -> tuple[int, bool]:
    """How many groups the second and third conversion make, and whether all share one."""

    def group() -> dist.ProcessGroup | None:
        norm = convert_sync_batchnorm(layer(torch.float32), group_size)[0]
        assert isinstance(norm, GroupedSyncBatchNorm)
        return norm.group

    first, made = group(), 0
    new_group = dist.new_group

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        made += 1
        return new_group(*args, **kwargs)

    dist.new_group = counted
    try:
        same = group() is first and group() is first
    finally:
        dist.new_group = new_group
    return made, same


@pytest.mark.parametrize("group_size", [0, 2, 3])
def test_process_groups_are_made_once(distributed: Distributed, group_size: int) -> None:
    assert distributed(groups_of_three_models, 4, group_size) == [(0, True)] * 4


def averaged_statistics() -> tuple[torch.Tensor, torch.Tensor]:
    x, _ = batch()
    model = convert_sync_batchnorm(layer(torch.float64), 1)
    model(x[dist.get_rank() * 5 : (dist.get_rank() + 1) * 5])
    norm: Any = model[0]
    before = norm.running_mean.clone()
    average_running_statistics(model)
    return before, norm.running_mean


def test_running_statistics_are_averaged_over_groups(distributed: Distributed) -> None:
    (before0, after0), (before1, after1) = distributed(averaged_statistics, 2)
    assert not torch.allclose(before0, before1)
    torch.testing.assert_close(after0, (before0 + before1) / 2)
    torch.testing.assert_close(after1, after0)


def low_precision(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x, grad = batch(dtype)
    mine = slice(dist.get_rank() * 5, (dist.get_rank() + 1) * 5)
    return run(convert_sync_batchnorm(layer(torch.float32), 0), x[mine], grad[mine])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 4e-3)], ids=str
)
def test_statistics_are_float32_under_low_precision(
    ranks_of: Distributed, dtype: torch.dtype, tolerance: float
) -> None:
    ranks = ranks_of(low_precision, 2, dtype)
    x, grad = batch(dtype)
    expected = run(layer(torch.float64), x.double(), grad.double())
    for rank in ranks:
        assert rank["y"].dtype == rank["x.grad"].dtype == dtype
        assert rank["0.running_var"].dtype == rank["0.weight.grad"].dtype == torch.float32
        for key in ("0.running_mean", "0.running_var"):  # of the rounded values, in float32
            torch.testing.assert_close(rank[key].double(), expected[key], rtol=1e-5, atol=0)
    for key in ("y", "x.grad"):  # rounded up to three times, to 8 bits or to 11
        whole = torch.cat([rank[key] for rank in ranks]).double()
        torch.testing.assert_close(whole, expected[key], rtol=tolerance, atol=tolerance)


def autocast(dtype: torch.dtype, group_size: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    model = convert_sync_batchnorm(Block(), group_size)
    x = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(dist.get_rank())) + 10
    with torch.autocast("cpu", dtype):
        convolved = model.conv(x)
        model(x).float().square().sum().backward()
    return convolved.detach(), {
        **gradients(model),
        **dict(model.named_buffers()),
    }


@pytest.mark.parametrize("group_size", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_leaves_statistics_in_float32(
    ranks_of: Distributed, dtype: torch.dtype, group_size: int
) -> None:
    ranks = ranks_of(autocast, 2, dtype, group_size)
    seen = [convolved for convolved, _ in ranks]
    for rank, (convolved, tensors) in enumerate(ranks):
        assert convolved.dtype == dtype  # or nothing is shown
        x = torch.cat(seen) if group_size == 0 else seen[rank]
        reference = nn.BatchNorm2d(3, dtype=torch.float64)
        reference(x.double())
        for key in ("running_mean", "running_var"):
            assert tensors[f"norm.{key}"].dtype == torch.float32
            expected = getattr(reference, key)
            torch.testing.assert_close(
                tensors[f"norm.{key}"].double(), expected, rtol=1e-5, atol=1e-6
            )
        assert all(value.isfinite().all() for value in tensors.values())


def momentum_and_eval(group_size: int, momentum: float) -> dict[str, torch.Tensor]:
    """Three training steps and one of evaluation, with the collectives of the latter."""
    x, _ = batch()
    norm = nn.BatchNorm2d(3, eps=0.1, momentum=momentum, dtype=torch.float64)
    model = convert_sync_batchnorm(nn.Sequential(norm), group_size)
    mine = slice(dist.get_rank() * 5, (dist.get_rank() + 1) * 5)
    for step in range(3):
        model(x[mine] * (step + 1))
    model.eval()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with collectives() as count:
        y = model(x[mine])
    assert all(torch.equal(before[name], b) for name, b in model.named_buffers())
    return {"y": y.detach(), "collectives": torch.tensor(sum(count.values())), **before}


@pytest.mark.parametrize("momentum", [0.1, 0.7])
def test_momentum_and_evaluation_are_those_of_torch(ranks_of: Distributed, momentum: float) -> None:
    x, _ = batch()
    expected = nn.BatchNorm2d(3, eps=0.1, momentum=momentum, dtype=torch.float64)
    for step in range(3):
        expected(x * (step + 1))
    expected.eval()
    ranks = ranks_of(momentum_and_eval, 2, 0, momentum)
    for rank in ranks:
        for name, buffer in expected.named_buffers():
            torch.testing.assert_close(rank[f"0.{name}"], buffer)
        assert int(rank["collectives"]) == 0
    torch.testing.assert_close(torch.cat([rank["y"] for rank in ranks]), expected(x))


@pytest.mark.parametrize("missing", [{"affine": False}, {"momentum": None}])
def test_layers_that_lack_something_are_refused(missing: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no weights, statistics or momentum"):
        convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3, **missing)), 0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Any) -> Any:
        return torch.relu(self.norm(self.conv(x)))


def two_resolutions(mode: str, group_size: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = convert_sync_batchnorm(nn.Sequential(*[Block() for _ in range(4)]), group_size)
    apply_activation_checkpointing([model], mode, [[1]] if mode == "groups" else None)
    generator = torch.Generator().manual_seed(1 + dist.get_rank())
    with collectives() as count:
        for _ in range(3):
            loss = model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean()
            loss = loss + model(torch.randn(6, 3, 4, 4, generator=generator)).square().mean()
            loss.backward()
    return {
        "loss": loss.detach(),
        "collectives": torch.tensor(sum(count.values())),
        **gradients(model),
        **dict(model.named_buffers()),
    }


@pytest.mark.parametrize("group_size", [0, 1])
@pytest.mark.parametrize("mode", ["full", "groups"])
def test_recompute_updates_nothing_and_communicates_nothing(
    ranks_of: Distributed, mode: str, group_size: int
) -> None:
    plain = ranks_of(two_resolutions, 2, "none", group_size)[0]
    recomputed = ranks_of(two_resolutions, 2, mode, group_size)[0]
    assert int(plain["0.norm.num_batches_tracked"]) == 6
    # 4 layers x 2 resolutions x 3 steps, one forward and one backward each
    assert int(plain["collectives"]) == (48 if group_size == 0 else 0)
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, rtol=0, atol=0, msg=key)


class Resolutions(Block):
    """Takes all resolutions in one call, as the trunk's blocks do."""

    def forward(self, x: list[torch.Tensor]) -> list[torch.Tensor]:
        return [super(Resolutions, self).forward(resolution) for resolution in x]


def compiled(backend: str, group_size: int, recompute: bool) -> list[dict[str, torch.Tensor]]:
    """Three steps at two resolutions: eager, then compiled block by block."""
    torch._dynamo.reset()
    results = []
    for fast in (False, True):
        torch.manual_seed(0)
        model = convert_sync_batchnorm(nn.Sequential(Resolutions(), Resolutions()), group_size)
        if fast:
            apply_compile(list(model), backend=backend)
        if recompute:
            apply_activation_checkpointing([model], "full")
        generator = torch.Generator().manual_seed(dist.get_rank())
        rows = 3 + dist.get_rank()
        x = [torch.randn(rows, 3, side, side, generator=generator) for side in (8, 4)]
        grads, losses = [], []
        with collectives() as count:
            for step in range(3):
                start = [(part * (step + 1)).requires_grad_() for part in x]
                y = model(list(start))
                loss = sum(part.square().mean() for part in y)
                loss.backward()
                losses.append(loss.detach())
                for part in start:
                    assert part.grad is not None
                    grads.append(part.grad)
        results.append(
            {
                "losses": torch.stack(losses),
                **{f"x{index}.grad": grad for index, grad in enumerate(grads)},
                **{f"{name}.grad": grad for name, grad in gradients(model).items()},
                **dict(model.named_buffers()),
                "collectives": torch.tensor(sum(count.values())),
            }
        )
    return results


def check_compiled(ranks: list[list[dict[str, torch.Tensor]]], group_size: int) -> None:
    layers = sum("running_mean" in key for key in ranks[0][0])
    for eager, fast in ranks:
        # two resolutions, three steps, forward and backward
        assert int(fast["collectives"]) == (layers * 12 if group_size == 0 else 0)
        assert int(fast["0.norm.num_batches_tracked"]) == 6
        for key, value in eager.items():  # sums in another order where the compiler fuses them
            torch.testing.assert_close(fast[key], value, rtol=1e-4, atol=1e-5, msg=key)


@pytest.mark.long
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("group_size", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_graph_under_compile(
    distributed: Distributed, group_size: int, recompute: bool
) -> None:
    # fullgraph: a break in the graph is an error. This backend needs no compiler of C++.
    check_compiled(distributed(compiled, 2, "aot_eager", group_size, recompute), group_size)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("group_size", [0, 1])
def test_one_graph_under_inductor(distributed: Distributed, group_size: int) -> None:
    check_compiled(distributed(compiled, 2, "inductor", group_size, True), group_size)


def compiled_around() -> str:
    model = convert_sync_batchnorm(nn.Sequential(Block()), 0)
    apply_activation_checkpointing([model], "full")
    torch._dynamo.reset()
    try:
        torch.compile(model, backend="aot_eager")(torch.randn(2, 3, 4, 4))
    except Exception as error:
        return str(error)
    return "no error"


def test_compiling_around_checkpointing_is_refused_by_torch(distributed: Distributed) -> None:
    # Were it not, the statistics might be computed twice without a word.
    for message in distributed(compiled_around, 2):
        assert "context_fn" in message


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
    assert reference.running_var is not None
    assert torch.equal(ours.running_var, reference.running_var)
    ours.eval(), reference.eval()
    assert torch.equal(ours(x), reference(x))
