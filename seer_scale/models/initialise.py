"""Draws initial values that depend on (seed, tensor name) alone.

Construction order, rank, world size and sharding strategy do not matter: a rank that holds a slice
of a tensor draws exactly the values of that slice. Distributions are SEER's (arXiv 2103.01988).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from seer_scale.models.heads import Prototypes

# Elements per seeded draw. Small enough that a slice costs little more than itself, and large
# enough that the few thousand seeds of a 10B model hardly ever meet: torch's CPU generator keeps
# 32 bits of a seed. Changing it changes every initial value.
CHUNK = 1 << 22


@dataclass(frozen=True)
class InitRule:
    """The distribution of one tensor's initial values.

    Attributes:
        kind: the family.
        scale: standard deviation of "normal", bound of "uniform", the value of "constant".
        unit_rows: length of the rows that are scaled to unit L2 norm after the draw, if any.
    """

    kind: Literal["normal", "uniform", "constant"]
    scale: float
    unit_rows: int | None = None


def initialise(model: nn.Module, seed: int) -> None:
    """Gives every parameter and buffer of `model` its initial value, in place.

    Raises:
        ValueError: if a tensor has no memory of its own here (meta device, or partitioned away).
        TypeError: if no rule is known for a tensor.
    """
    rules = init_rules(model)
    for name, tensor in _named_tensors(model):
        if tensor.is_meta or tensor.numel() == 0:
            raise ValueError(
                f"{name} has no memory to initialise: materialise it first (to_empty), or write "
                "initial_values(...) into the slice that this process holds."
            )
        values = initial_values(rules[name], name=name, size=tensor.numel(), seed=seed)
        with torch.no_grad():
            tensor.copy_(values.view(tensor.shape))


def seeded_values(model: nn.Module, seed: int) -> Callable[[str, int, int], Tensor]:
    """Returns a function (name, start, stop) -> those elements of a tensor of `model`.

    `model` may be on the meta device.

    Raises:
        TypeError: if no rule is known for a tensor.
    """
    rules = init_rules(model)
    sizes = {name: tensor.numel() for name, tensor in _named_tensors(model)}

    def values(name: str, start: int, stop: int) -> Tensor:
        return initial_values(
            rules[name], name=name, size=sizes[name], seed=seed, start=start, stop=stop
        )

    return values


def init_rules(model: nn.Module) -> dict[str, InitRule]:
    """The rule of every parameter and buffer by name; works on meta and on partitioned tensors.

    Raises:
        TypeError: if no rule is known for a tensor, so that none is forgotten.
    """
    rules = {}
    for prefix, module in model.named_modules():
        known = _module_rules(module)
        for leaf, _ in _own_tensors(module):
            name = f"{prefix}.{leaf}" if prefix else leaf
            if leaf not in known:
                raise TypeError(f"no initial value is known for {name}, of {type(module)}")
            rules[name] = known[leaf]
    return rules


def initial_values(
    rule: InitRule, *, name: str, size: int, seed: int, start: int = 0, stop: int | None = None
) -> Tensor:
    """Draws the flat elements `start` to `stop` of the tensor `name`, as float32 on CPU.

    Args:
        rule: the tensor's entry of `init_rules`.
        name: the tensor's name in the unsharded, unwrapped model.
        size: number of elements of the whole tensor.
        seed: seed of the run.
        start: first element of the slice.
        stop: one past its last element; `size` unless given.
    """
    stop = size if stop is None else stop
    values = torch.empty(stop - start, dtype=torch.float32, device="cpu")
    if rule.kind == "constant":
        return values.fill_(rule.scale)
    chunk = CHUNK // rule.unit_rows * rule.unit_rows if rule.unit_rows else CHUNK
    for first in range(start // chunk * chunk, stop, chunk):
        # Always the whole chunk: torch's vectorised draws depend on the length that is asked for.
        drawn = _draw(rule, f"{seed}/{name}/{first}", min(chunk, size - first))
        low, high = max(start, first), min(stop, first + chunk)
        values[low - start : high - start] = drawn[low - first : high - first]
    return values


def _draw(rule: InitRule, key: str, length: int) -> Tensor:
    digest = hashlib.sha256(key.encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
    values = torch.empty(length, dtype=torch.float32, device="cpu")
    if rule.kind == "normal":
        values.normal_(0.0, rule.scale, generator=generator)
    else:
        values.uniform_(-rule.scale, rule.scale, generator=generator)
    if rule.unit_rows:
        values = F.normalize(values.view(-1, rule.unit_rows), dim=1).view(-1)
    return values


def _module_rules(module: nn.Module) -> dict[str, InitRule]:
    """Rules of a module's own tensors, from its sizes: partitioned tensors have no shape."""
    if isinstance(module, nn.Conv2d):
        area = math.prod(module.kernel_size)
        # SEER's fan_out is not divided by the number of groups.
        weight = InitRule("normal", math.sqrt(2 / (area * module.out_channels)))
        fan_in = area * module.in_channels // module.groups
        return {"weight": weight, "bias": InitRule("uniform", 1 / math.sqrt(fan_in))}
    if isinstance(module, nn.Linear):
        rule = InitRule("uniform", 1 / math.sqrt(module.in_features))
        return {"weight": rule, "bias": rule}
    if isinstance(module, Prototypes):
        bound = 1 / math.sqrt(module.dim)
        return {"weight": InitRule("uniform", bound, unit_rows=module.dim)}
    # A synchronised BatchNorm need not derive from torch's.
    if isinstance(module, _BatchNorm) or hasattr(module, "running_var"):
        one, zero = InitRule("constant", 1.0), InitRule("constant", 0.0)
        return {
            "weight": one,
            "bias": zero,
            "running_mean": zero,
            "running_var": one,
            "num_batches_tracked": zero,
        }
    return {}


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()
