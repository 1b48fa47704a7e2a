"""SliceSGD against LARC's formula on whole float64 tensors, whole and cut into padded slices."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from harness.pool import Distributed
from seer_scale import distributed as ranks
from seer_scale.optim.groups import join, parameter_groups
from seer_scale.optim.loss_scale import LossScale
from seer_scale.optim.slice_sgd import MOMENTUM, SliceSGD, apply_schedule
from seer_scale.optim.update import fused_update_, update_, wide_norms

Result = dict[str, tuple[Tensor, Tensor]]  # values and momentum by name
Settings = dict[str, dict[str, float]]  # weight_decay, momentum and eps by name

LR, BETA, DECAY, TRUST, EPS, STEPS = 0.3, 0.9, 1e-2, 0.05, 1e-8, 4
PADDING = 1e6  # what no rank may ever use

# On four ranks: rows cut in the middle, ranks with nothing but padding, a last slice in part.
SHAPES = {
    "conv.weight": (4, 3, 3, 3),
    "bias": (5,),
    "scale": (1,),
    "zero.weight": (3, 4),
    "unused.weight": (2, 3),
    "prototypes.weight": (5, 7),
}
UNIT_ROWS = frozenset({"prototypes.weight"})
# Settings of single tensors, the first, one in the middle and the last among them.
OWN = {
    "conv.weight": {"weight_decay": 0.0, "eps": 0.5},
    "scale": {"momentum": 0.5},
    "prototypes.weight": {"weight_decay": 0.3, "momentum": 0.0},
}


def start_value(name: str, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Tensor:
    generator = torch.Generator().manual_seed(list(shapes).index(name))
    value = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
    if name in UNIT_ROWS:
        unit: Tensor = value / value.norm(dim=1, keepdim=True)
        return unit
    return value * 0 if name == "zero.weight" else value


def gradient(name: str, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Tensor:
    generator = torch.Generator().manual_seed(100 * (step + 1) + list(shapes).index(name))
    value = torch.randn(shapes[name], generator=generator, dtype=torch.float64)
    return value * 0 if name == "unused.weight" else value


def norm(tensor: Tensor) -> float:
    return math.sqrt(math.fsum(x * x for x in tensor.flatten().tolist()))


def oracle(
    trust: float | None,
    frozen_steps: int = 0,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    nesterov: bool = False,
    own: Settings | None = None,
) -> tuple[Result, list[float]]:
    """The formula of the class's docstring, tensor by tensor; `own` settings by name."""
    values = {name: start_value(name, shapes) for name in shapes}
    momenta = {name: torch.zeros_like(value) for name, value in values.items()}
    grad_norms = []
    for step in range(STEPS):
        squares = []
        for name, p in values.items():
            if name in UNIT_ROWS and step < frozen_steps:
                continue
            mine = (own or {}).get(name, {})
            decay, eps = mine.get("weight_decay", DECAY), mine.get("eps", EPS)
            beta = mine.get("momentum", BETA)
            g = gradient(name, step, shapes)
            squares.append(norm(g) ** 2)
            if trust is None:
                g = g + decay * p
            elif norm(p) > 0 and norm(g) > 0:
                g = trust * norm(p) / (norm(g) + decay * norm(p) + eps) * (g + decay * p)
            momenta[name] = beta * momenta[name] + g
            p -= LR * (g + beta * momenta[name] if nesterov else momenta[name])
            if name in UNIT_ROWS:
                for row in p:
                    row /= norm(row)
        grad_norms.append(math.sqrt(math.fsum(squares)))
    return {name: (values[name].flatten(), momenta[name].flatten()) for name in values}, grad_norms


def build(
    groups: list[dict[str, Any]],
    trust: float | None,
    shards: int = 1,
    nesterov: bool = False,
    loss_scale: LossScale | None = None,
) -> SliceSGD:
    return SliceSGD(
        groups,
        momentum=BETA,
        nesterov=nesterov,
        weight_decay=DECAY,
        trust_coefficient=trust,
        shards=shards,
        loss_scale=loss_scale,
    )


class Tensors(nn.Module):
    """The tensors of SHAPES as parameters of a model."""

    def __init__(self) -> None:
        super().__init__()
        for name in SHAPES:
            owner, _, leaf = name.rpartition(".")
            module: nn.Module = self
            if owner:
                module = nn.Module()
                self.add_module(owner, module)
            module.register_parameter(leaf, nn.Parameter(start_value(name)))


def run_whole(
    trust: float | None, frozen_steps: int = 0, scale: float | None = None
) -> tuple[Result, list[float]]:
    model = Tensors()
    groups = parameter_groups(model, unit_rows=UNIT_ROWS)
    optimizer = build(groups, trust, loss_scale=LossScale(scale) if scale else None)
    grad_norms = []
    for step in range(STEPS):
        frozen = UNIT_ROWS if step < frozen_steps else frozenset()
        apply_schedule(optimizer.param_groups, lr=LR, frozen=frozen)
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, step) * (scale or 1.0)
        optimizer.step()
        grad_norms.append(float(optimizer.take_grad_norm()))
    result = {s.name: (s.values.clone(), s.momentum.clone()) for s in optimizer.slices()}
    return result, grad_norms


def assert_same(actual: Result, expected: Result) -> None:
    assert actual.keys() == expected.keys()
    for name, tensors in expected.items():
        for mine, theirs, kind in zip(actual[name], tensors, ("value", "momentum"), strict=True):
            torch.testing.assert_close(
                mine, theirs, rtol=1e-11, atol=1e-13, msg=partial("{}: {}".format, (name, kind))
            )


@pytest.mark.parametrize("trust", [TRUST, None])
@pytest.mark.parametrize("frozen_steps", [0, 2])
@pytest.mark.parametrize("scale", [None, 8.0])
def test_whole_tensors_follow_the_formula(
    trust: float | None, frozen_steps: int, scale: float | None
) -> None:
    result, grad_norms = run_whole(trust, frozen_steps, scale)
    expected, expected_norms = oracle(trust, frozen_steps)
    assert_same(result, expected)
    assert grad_norms == pytest.approx(expected_norms, rel=1e-12)


def test_without_norm_the_raw_gradient_is_used_and_nothing_decays() -> None:
    parameters = {
        "zero": nn.Parameter(torch.zeros(3)),
        "still": nn.Parameter(torch.tensor([1.0, -2.0])),
    }
    groups = [
        {"params": [p], "name": n, "shape": tuple(p.shape), "unit_rows": False, "frozen": False}
        for n, p in parameters.items()
    ]
    optimizer = build(groups, TRUST)
    apply_schedule(optimizer.param_groups, lr=0.5)
    parameters["zero"].grad = torch.tensor([1.0, 2.0, -4.0])
    parameters["still"].grad = torch.zeros(2)
    optimizer.step()
    assert parameters["zero"].tolist() == [-0.5, -1.0, 2.0]
    assert parameters["still"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    ("decay", "nesterov", "exact"),
    [(0.0, False, True), (1e-2, False, False), (0.0, True, True), (1e-2, True, False)],
)
def test_without_larc_it_is_torch_sgd(decay: float, nesterov: bool, exact: bool) -> None:
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    theirs = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    theirs.load_state_dict(ours.state_dict())
    optimizer = SliceSGD(
        parameter_groups(ours, unit_rows=frozenset()),
        momentum=BETA,
        nesterov=nesterov,
        weight_decay=decay,
        trust_coefficient=None,
    )
    apply_schedule(optimizer.param_groups, lr=0.1)
    reference = torch.optim.SGD(
        theirs.parameters(),
        lr=0.1,
        momentum=BETA,
        nesterov=nesterov,
        weight_decay=decay,
        foreach=False,
    )
    for _ in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Weight decay is added in another operation than torch's, and rounded once more.
        tolerance = 0.0 if exact else 1e-6
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("plain", ["weight", "bias"])
def test_two_groups_are_those_of_torch_sgd(plain: str, one_by_one: bool) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizer = build(parameter_groups(ours, unit_rows=frozenset()), None)
    apply_schedule(optimizer.param_groups, lr=0.1)
    for group in optimizer.param_groups:
        if group["name"].endswith(plain):
            group["weight_decay"], group["momentum"] = 0.0, 0.5
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in theirs.named_parameters() if not name.endswith(plain)]},
        {
            "params": [p for name, p in theirs.named_parameters() if name.endswith(plain)],
            "weight_decay": 0.0,
            "momentum": 0.5,
        },
    ]
    reference = torch.optim.SGD(groups, lr=0.1, momentum=BETA, weight_decay=DECAY, foreach=False)
    for _ in range(5):
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            mine.grad = torch.randn_like(mine)
            other.grad = mine.grad.clone()
        if one_by_one:
            for mine in reversed(list(ours.parameters())):
                optimizer.step_now([mine])
        else:
            optimizer.step()
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # As above: weight decay is rounded once more than torch's.
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)


def test_frozen_tensors_stay_and_remember_nothing() -> None:
    model = Tensors()
    optimizer = build(parameter_groups(model, unit_rows=UNIT_ROWS), TRUST)
    prototypes = model.get_parameter("prototypes.weight")
    start = prototypes.detach().clone()
    for step in range(3):
        apply_schedule(optimizer.param_groups, lr=LR, frozen=UNIT_ROWS)
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, step) * 1e9 ** (name in UNIT_ROWS)
        optimizer.step()
        others = [norm(gradient(name, step)) ** 2 for name in SHAPES if name not in UNIT_ROWS]
        assert float(optimizer.take_grad_norm()) == pytest.approx(math.sqrt(sum(others)))
    assert torch.equal(prototypes, start)
    assert not optimizer.state[prototypes].get(MOMENTUM, torch.zeros(1)).any()
    # The first free step is a first step: no momentum, and a ratio of this gradient alone.
    apply_schedule(optimizer.param_groups, lr=LR)
    prototypes.grad = gradient("prototypes.weight", 0)
    optimizer.step()
    g, p = gradient("prototypes.weight", 0), start
    ratio = TRUST * norm(p) / (norm(g) + DECAY * norm(p) + EPS)
    expected = p - LR * ratio * (g + DECAY * p)
    torch.testing.assert_close(prototypes.detach(), expected / expected.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(wrong: float, nesterov: bool) -> None:
    model = Tensors()
    groups = parameter_groups(model, unit_rows=UNIT_ROWS)
    optimizer = build(groups, TRUST, nesterov=nesterov)
    apply_schedule(optimizer.param_groups, lr=LR)
    before: Result = {}
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient(name, step)
        if step == 1:
            gradient_of_bias = model.get_parameter("bias").grad
            assert gradient_of_bias is not None
            gradient_of_bias.view(-1)[0] = wrong
            before = {s.name: (s.values.clone(), s.momentum.clone()) for s in optimizer.slices()}
        optimizer.step()
        assert math.isfinite(optimizer.take_grad_norm()) == (step != 1)
        for part in optimizer.slices():
            if step == 1:
                assert torch.equal(part.values, before[part.name][0])
                assert torch.equal(part.momentum, before[part.name][1])
    # The last step is the second of an optimizer that has never seen the wrong one.
    other = Tensors()
    honest = build(parameter_groups(other, unit_rows=UNIT_ROWS), TRUST, nesterov=nesterov)
    apply_schedule(honest.param_groups, lr=LR)
    for step in (0, 2):
        for name, parameter in other.named_parameters():
            parameter.grad = gradient(name, step)
        honest.step()
    for mine, theirs in zip(optimizer.slices(), honest.slices(), strict=True):
        assert torch.equal(mine.values, theirs.values)
        assert torch.equal(mine.momentum, theirs.momentum)


def test_tensors_without_gradient_are_left_alone() -> None:
    model = Tensors()
    optimizer = build(parameter_groups(model, unit_rows=UNIT_ROWS), TRUST)
    apply_schedule(optimizer.param_groups, lr=LR)
    optimizer.step()
    assert float(optimizer.take_grad_norm()) == 0
    model.get_parameter("bias").grad = gradient("bias", 0)
    optimizer.step()
    assert float(optimizer.take_grad_norm()) == pytest.approx(norm(gradient("bias", 0)))
    assert float(optimizer.take_grad_norm()) == 0  # taken
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start_value(name)) == (name != "bias")


def test_groups_name_each_trainable_tensor_and_know_partitioned_shapes() -> None:
    model = Tensors()
    model.get_parameter("bias").requires_grad_(False)
    partitioned: Any = model.get_parameter("conv.weight")
    partitioned.ds_shape = torch.Size([8, 3, 3, 3])  # as ZeRO-3 marks what it took away
    groups = parameter_groups(model, unit_rows=UNIT_ROWS)
    assert {group["name"] for group in groups} == SHAPES.keys() - {"bias"}
    assert all(len(group["params"]) == 1 and not group["frozen"] for group in groups)
    assert {group["name"] for group in groups if group["unit_rows"]} == UNIT_ROWS
    by_name = {group["name"]: group["shape"] for group in groups}
    assert by_name["conv.weight"] == (8, 3, 3, 3)
    assert by_name["scale"] == (1,)


# ------------------------------------------------------------------------------------- slices


def cut(whole: Tensor, rank: int, world: int) -> Tensor:
    """This rank's flat slice as ZeRO cuts it: equal lengths, the last ones filled up."""
    length = -(-whole.numel() // world)
    padded = torch.full((length * world,), PADDING, dtype=whole.dtype)
    padded[: whole.numel()] = whole.flatten()
    return padded[rank * length : (rank + 1) * length].clone()


@contextmanager
def counted_all_reduces() -> Iterator[list[int]]:
    """Elements of each all-reduce inside the block."""
    sizes: list[int] = []
    original = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kw: Any) -> Any:
        sizes.append(tensor.numel())
        return original(tensor, *args, **kw)

    dist.all_reduce = counting
    try:
        yield sizes
    finally:
        dist.all_reduce = original


def run_sharded(
    mode: str,
    trust: float | None,
    frozen_steps: int,
    shapes: dict[str, tuple[int, ...]],
    nesterov: bool = False,
    own: Settings | None = None,
) -> tuple[list[tuple[str, int, Tensor, Tensor]], list[float], list[int]]:
    """Slices after STEPS steps, gradient norms, all-reduces of the last step.

    Modes: `together` steps all tensors in one call; `each` steps them one by one and empties the
    other groups, as ZeRO does; `reduced` is `each` after `reduce_norms`; `joined` and `cut first`
    are two groups of joined tensors, as ZeRO 1 and 2 and as ZeRO 3 cut them.
    """
    rank, world = ranks.rank(), ranks.world_size()
    if mode in ("joined", "cut first"):
        return run_joined(mode == "cut first", trust, frozen_steps, shapes, nesterov, own)
    parameters = {n: nn.Parameter(cut(start_value(n, shapes), rank, world)) for n in shapes}
    groups = [
        {"params": [p], "name": n, "shape": shapes[n], "unit_rows": n in UNIT_ROWS, "frozen": False}
        | (own or {}).get(n, {})
        for n, p in parameters.items()
    ]
    optimizer = build(groups, trust, shards=world, nesterov=nesterov)
    grad_norms, last_sizes = [], []
    for step in range(STEPS):
        frozen = UNIT_ROWS if step < frozen_steps else frozenset()
        apply_schedule(optimizer.param_groups, lr=LR, frozen=frozen)
        grads = {n: cut(gradient(n, step, shapes), rank, world) for n in shapes}
        with counted_all_reduces() as sizes:
            if mode == "together":
                for name, parameter in parameters.items():
                    parameter.grad = grads[name]
                optimizer.step()
            else:
                if mode == "reduced":
                    # ZeRO keeps a partition's gradient in pieces where a bucket's border cuts it.
                    optimizer.reduce_norms({n: [g[:1], g[1:]] for n, g in grads.items()})
                for group in optimizer.param_groups:
                    others = [g for g in optimizer.param_groups if g is not group]
                    for other in others:
                        other["params"] = []
                    parameters[group["name"]].grad = grads[group["name"]]
                    optimizer.step()
                    parameters[group["name"]].grad = None
                    for other in others:
                        other["params"] = [parameters[other["name"]]]
        grad_norms.append(float(optimizer.take_grad_norm()))
        last_sizes = sizes
    result = [(s.name, s.offset, s.values.clone(), s.momentum.clone()) for s in optimizer.slices()]
    for name, parameter in parameters.items():  # the padding is where it was
        left = max(0, min(parameter.numel(), math.prod(shapes[name]) - rank * parameter.numel()))
        assert (parameter.detach()[left:] == PADDING).all()
    return result, grad_norms, last_sizes


def run_joined(
    cut_first: bool,
    trust: float | None,
    frozen_steps: int,
    shapes: dict[str, tuple[int, ...]],
    nesterov: bool,
    own: Settings | None,
) -> tuple[list[tuple[str, int, Tensor, Tensor]], list[float], list[int]]:
    """`run_sharded` with few groups, each of which steps while the others are empty."""
    rank, world = ranks.rank(), ranks.world_size()

    def held(group: dict[str, Any], values: Callable[[str], Tensor]) -> list[Tensor]:
        """This rank's part of a joined group, in pieces."""
        wholes = [values(tensor["name"]) for tensor in group["tensors"]]
        if cut_first:
            return [cut(whole, rank, world) for whole in wholes]
        return [cut(torch.cat([whole.flatten() for whole in wholes]), rank, world)]

    single = [
        {"params": [], "name": n, "shape": shapes[n], "unit_rows": n in UNIT_ROWS, "frozen": False}
        | (own or {}).get(n, {})
        for n in shapes
    ]
    half = sum(map(math.prod, shapes.values())) // 2
    groups = join(single, most=half, cut_first=cut_first)
    starts = [held(group, lambda name: start_value(name, shapes)) for group in groups]
    holders = [nn.Parameter(torch.cat(pieces)) for pieces in starts]
    for group, holder in zip(groups, holders, strict=True):
        group["params"] = [holder]
    optimizer = build(groups, trust, shards=world, nesterov=nesterov)
    grad_norms: list[float] = []
    for step in range(STEPS):
        frozen = UNIT_ROWS if step < frozen_steps else frozenset()
        apply_schedule(optimizer.tensors, lr=LR, frozen=frozen)
        gradients = [
            held(group, lambda name, step=step: gradient(name, step, shapes))  # type: ignore[misc]
            for group in groups
        ]
        with counted_all_reduces() as sizes:
            optimizer.reduce_norms(
                {g["name"]: pieces for g, pieces in zip(groups, gradients, strict=True)}
            )
            for index, group in enumerate(groups):
                for other in groups:
                    other["params"] = [holders[index]] if other is group else []
                holders[index].grad = torch.cat(gradients[index])
                optimizer.step()
                holders[index].grad = None
        for group, holder in zip(groups, holders, strict=True):
            group["params"] = [holder]
        grad_norms.append(float(optimizer.take_grad_norm()))
    result = [(s.name, s.offset, s.values.clone(), s.momentum.clone()) for s in optimizer.slices()]
    for pieces, holder in zip(starts, holders, strict=True):  # the padding is where it was
        assert torch.equal(holder.detach() == PADDING, torch.cat(pieces) == PADDING)
    return result, grad_norms, sizes


def joined(
    per_rank: list[tuple[list[tuple[str, int, Tensor, Tensor]], list[float], list[int]]],
    shapes: dict[str, tuple[int, ...]],
) -> Result:
    """The whole tensors; every element must lie in exactly one slice."""
    parts: dict[str, list[tuple[int, Tensor, Tensor]]] = {name: [] for name in shapes}
    for slices, _, _ in per_rank:
        for name, offset, values, momentum in slices:
            parts[name].append((offset, values, momentum))
    result = {}
    for name, found in parts.items():
        end = 0
        for offset, values, momentum in found:
            assert offset == end
            assert values.numel() == momentum.numel() > 0
            end += values.numel()
        assert end == math.prod(shapes[name])
        result[name] = (torch.cat([v for _, v, _ in found]), torch.cat([m for _, _, m in found]))
    return result


@pytest.mark.parametrize("trust", [TRUST, None])
@pytest.mark.parametrize("mode", ["together", "each", "reduced", "joined", "cut first"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_slices_follow_the_formula_of_whole_tensors(
    distributed: Distributed, world_size: int, mode: str, trust: float | None
) -> None:
    frozen_steps = 0 if mode in ("together", "each") else 2
    per_rank = distributed(run_sharded, world_size, mode, trust, frozen_steps, SHAPES)
    expected, expected_norms = oracle(trust, frozen_steps)
    assert_same(joined(per_rank, SHAPES), expected)
    for _, grad_norms, _ in per_rank:
        assert grad_norms == pytest.approx(expected_norms, rel=1e-12)


def test_nesterov_is_exact_on_slices(distributed: Distributed) -> None:
    per_rank = distributed(run_sharded, 2, "each", None, 0, SHAPES, True)
    assert_same(joined(per_rank, SHAPES), oracle(None, nesterov=True)[0])


@pytest.mark.parametrize("trust", [TRUST, None])
@pytest.mark.parametrize("mode", ["together", "each", "reduced", "joined", "cut first"])
def test_a_tensor_may_have_its_own_decay_momentum_and_eps(
    distributed: Distributed, mode: str, trust: float | None
) -> None:
    per_rank = distributed(run_sharded, 2, mode, trust, 0, SHAPES, False, OWN)
    assert_same(joined(per_rank, SHAPES), oracle(trust, own=OWN)[0])


@pytest.mark.parametrize(
    ("mode", "reductions"),
    [("together", [12]), ("each", [2] * 6), ("reduced", [12]), ("joined", [12])],
)
def test_norms_cost_one_all_reduce_when_known_together(
    distributed: Distributed, mode: str, reductions: list[int]
) -> None:
    rows = SHAPES["prototypes.weight"][0]
    for _, _, sizes in distributed(run_sharded, 2, mode, TRUST, 0, SHAPES):
        assert sorted(sizes) == sorted([*reductions, rows])


@pytest.mark.parametrize("mode", ["together", "joined"])
@pytest.mark.parametrize("shape", [(1, 5), (2, 3), (5, 1), (2, 5), (7, 3), (3, 16)])
def test_rows_stay_unit_wherever_slices_cut_them(
    distributed: Distributed, shape: tuple[int, int], mode: str
) -> None:
    shapes: dict[str, tuple[int, ...]] = {"prototypes.weight": shape}
    if mode == "joined":
        shapes = {"scale": (3,)} | shapes  # so that rows begin elsewhere
    per_rank = distributed(run_sharded, 4, mode, TRUST, 0, shapes)
    result = joined(per_rank, shapes)
    assert_same(result, oracle(TRUST, shapes=shapes)[0])
    rows = result["prototypes.weight"][0].view(shape).norm(dim=1)
    torch.testing.assert_close(rows, torch.ones(shape[0], dtype=torch.float64))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)])
def test_what_a_gpu_runs_is_the_same_update(momentum: float, nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = (5, 70_000, 1)
    drawn = [[torch.randn(n, generator=generator) for n in sizes] for _ in range(3)]
    factors = [list(torch.rand(len(sizes), generator=generator).unbind()) for _ in range(2)]
    found = []
    for function in (update_, fused_update_):
        for skipped in (False, True):
            values, grads, momenta = [[tensor.clone() for tensor in kind] for kind in drawn]
            if skipped:
                grads[1][3] = math.nan
            given: dict[str, Any] = {"on_grad": factors[0], "on_value": factors[1], "lr": 0.1}
            given["momentum"] = momentum
            verdict = torch.tensor(skipped)
            function(values, grads, momenta, skipped=verdict, nesterov=nesterov, **given)
            # Without momentum what is kept of it says nothing.
            found.append([*values, *(momenta if momentum else drawn[2])])
    moved, left, fused, fused_left = found
    torch.testing.assert_close(fused, moved, rtol=1e-5, atol=1e-6)
    for unmoved in (left, fused_left):
        torch.testing.assert_close(unmoved, [*drawn[0], *drawn[2]], rtol=0, atol=0)
    assert not torch.equal(moved[1], left[1])


def test_wide_norms_are_those_of_float64() -> None:
    tensors = [
        torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (1, 999, 300_001)
    ]
    tensors.append(1e3 + torch.randn(1 << 20))
    for norm, tensor in zip(wide_norms(tensors), tensors, strict=True):
        assert norm.dtype == torch.float64
        assert float(norm) == pytest.approx(float(tensor.double().norm()), rel=1e-8)


def test_the_reported_norm_has_no_loss_scale_in_it_where_the_scale_doubles() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    group = {"params": [weight], "name": "w", "shape": (2,), "unit_rows": False, "frozen": False}
    optimizer = SliceSGD(
        [group],
        lr=0.5,
        momentum=0.0,
        weight_decay=0.0,
        trust_coefficient=None,
        loss_scale=LossScale(value=4.0, interval=1),
    )
    for scale in (4.0, 8.0):  # it doubles after every good step
        weight.grad = scale * torch.tensor([3.0, 4.0])
        optimizer.step()
        assert optimizer.take_grad_norm() == 5.0
    assert weight.tolist() == [-3.0, -4.0]
