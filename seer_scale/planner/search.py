"""Search for the configurations of a run that fit a machine, the fastest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from seer_scale.errors import ConfigError
from seer_scale.parallel.activation_profile import ActivationProfile, BlockProfile, Cost
from seer_scale.performance.hardware import Hardware, load_hardware
from seer_scale.planner.model import profile_of
from seer_scale.planner.plan import STRATEGIES, plan
from seer_scale.planner.planned import Plan

MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KEYS = {
    "checkpointing": "sharding.activation_checkpointing",
    "groups": "sharding.checkpoint_groups",
    "micro": "train.micro_batch_size",
    "passes": "train.gradient_accumulation",
    "sync": "sharding.sync_bn_group_size",
}


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        fitting: plans that fit, the fastest first.
        tried: number of configurations that were tried.
        nearest: the plan that needs least memory.
    """

    fitting: list[Plan]
    tried: int
    nearest: Plan | None


def search(
    recipe: str,
    hardware: str | Hardware,
    *,
    nodes: int,
    gpus_per_node: int,
    strategy: str | None = None,
    overrides: Sequence[str] = (),
    images: int | None = None,
) -> Found:
    """Tries every strategy x checkpointing x micro-batch x SyncBatchNorm group.

    Settings that `strategy` and `overrides` name stay as they are. Every configuration trains the
    same: images of the run and of a step stay, and accumulation follows the micro-batch.
    Activations are profiled at the smallest and the largest micro-batch and interpolated linearly,
    which never gives too few.

    Args:
        recipe: name of a recipe, or path of a recipe file.
        hardware: name of a hardware profile, path of one, or the profile itself.
        nodes: number of machines.
        gpus_per_node: ranks on each machine.
        strategy: a key of `STRATEGIES`; None tries all of them.
        overrides: `section.key=value` texts.
        images: images of the whole run, in place of the recipe's.

    Raises:
        ConfigError: if the recipe itself cannot be planned there.
    """
    known = hardware if isinstance(hardware, Hardware) else load_hardware(hardware)
    own = plan(
        recipe,
        known,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        strategy=strategy,
        overrides=overrides,
        images=images,
    )
    fixed = dict(override.split("=", 1) for override in overrides)
    choices = list(_choices(own, fixed, strategy))
    micros = sorted({micro for _, _, micro, _ in choices})
    fitting: list[Plan] = []
    nearest: Plan | None = None
    for name, mode, micro, group in choices:
        values = {**fixed, **_values(own, mode, micro, group)}
        share = (micro - micros[0]) / max(1, micros[-1] - micros[0])
        low, high = (profile_of(own.model, own.batch, m, name) for m in (micros[0], micros[-1]))
        try:
            found = plan(
                recipe,
                known,
                nodes=nodes,
                gpus_per_node=gpus_per_node,
                strategy=name,
                overrides=[f"{key}={value}" for key, value in values.items()],
                images=images,
                profile=_between(low, high, share),
            )
        except ConfigError:  # this combination cannot be trained
            continue
        if found.fits:
            fitting.append(found)
        if nearest is None or found.memory.total < nearest.memory.total:
            nearest = found
    fitting.sort(key=lambda found: -found.images_per_second)
    return Found(fitting, len(choices), nearest)


def nodes_needed(
    recipe: str,
    hardware: str | Hardware,
    *,
    gpus_per_node: int,
    strategy: str | None,
    overrides: Sequence[str],
) -> Plan | None:
    """Plans the same configuration on the fewest nodes, a power of two up to 2048, that fit.

    Returns:
        The plan; None if the configuration does not fit on any number of nodes.
    """
    for nodes in (2**power for power in range(12)):
        try:
            found = plan(
                recipe,
                hardware,
                nodes=nodes,
                gpus_per_node=gpus_per_node,
                strategy=strategy,
                overrides=overrides,
            )
        except ConfigError:
            continue
        if found.fits:
            return found
    return None


def _choices(
    own: Plan, fixed: dict[str, str], strategy: str | None
) -> Iterator[tuple[str, str, int, int]]:
    """Combinations of strategy, checkpointing, micro-batch and SyncBatchNorm group."""
    layout, batch = own.layout, own.batch
    names: Sequence[str] = [strategy] if strategy else list(STRATEGIES)
    if not strategy and fixed.keys() & {"sharding.strategy", "sharding.deepspeed_config"}:
        names = [own.strategy]
    modes: Sequence[str] = list(dict.fromkeys([own.activation_checkpointing, "none", "full"]))
    if fixed.keys() & {KEYS["checkpointing"], KEYS["groups"]}:
        modes = [own.activation_checkpointing]
    micros: Sequence[int] = [batch.micro_batch_size]
    if not fixed.keys() & {KEYS["micro"], KEYS["passes"]}:
        even = [size for size in MICRO_BATCHES if batch.images % size == 0]
        micros = sorted({*micros, *even})
    by_ranks: dict[int, int] = {}  # of values that mean the same group, the recipe's comes first
    for size in (layout.sync_bn_group_size, 0, layout.gpus_per_node, 64):
        ranks = layout.group_ranks(size)
        if own.world % ranks == 0:
            by_ranks.setdefault(ranks, size)
    syncs: Sequence[int] = list(by_ranks.values())
    if KEYS["sync"] in fixed:
        syncs = [layout.sync_bn_group_size]
    yield from itertools.product(names, modes, micros, syncs)


def _values(own: Plan, mode: str, micro: int, group: int) -> dict[str, str]:
    """Overrides for a choice, where it differs from the recipe."""
    values = {}
    if mode != own.activation_checkpointing:
        values[KEYS["checkpointing"]] = mode
        if own.checkpoint_groups is not None:
            values[KEYS["groups"]] = "null"
    if micro != own.batch.micro_batch_size:
        values[KEYS["micro"]] = str(micro)
        values[KEYS["passes"]] = str(own.batch.images // micro)
    if group != own.layout.sync_bn_group_size:
        values[KEYS["sync"]] = str(group)
    return values


def _between(low: ActivationProfile, high: ActivationProfile, share: float) -> ActivationProfile:
    """Interpolates two profiles; share 0 is `low`, share 1 is `high`."""

    def mixed(a: float, b: float) -> int:
        return math.ceil(a + share * (b - a))

    def cost(a: Cost, b: Cost) -> Cost:
        return Cost(mixed(a.held, b.held), mixed(a.peak, b.peak))

    return ActivationProfile(
        mixed(low.ends, high.ends),
        cost(low.stem, high.stem),
        tuple(
            BlockProfile(cost(a.kept, b.kept), cost(a.recomputed, b.recomputed))
            for a, b in zip(low.blocks, high.blocks, strict=True)
        ),
        cost(low.head, high.head),
    )
