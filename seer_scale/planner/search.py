"""The configurations of a run that fit a machine, the fastest first."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from seer_scale.errors import ConfigError
from seer_scale.parallel.activation_profile import ActivationProfile, BlockProfile, Cost
from seer_scale.performance.hardware import Hardware, load_hardware
from seer_scale.planner.plan import STRATEGIES, plan, profile_of
from seer_scale.planner.planned import Plan

# No SwAV run with more images per step is published.
LARGEST_BATCH = 16_384
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
KEYS = {
    "checkpointing": "sharding.activation_checkpointing",
    "groups": "sharding.checkpoint_groups",
    "micro": "train.micro_batch_size",
    "steps": "train.steps",
    "sync": "sharding.sync_bn_group_size",
}


@dataclass(frozen=True)
class Found:
    """What a search has seen.

    Attributes:
        fitting: plans that fit, the fastest first.
        tried: how many there were.
        nearest: the plan that takes least memory.
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
) -> Found:
    """Tries every strategy x checkpointing x micro-batch x SyncBatchNorm group.

    What `strategy` and `overrides` name stays as it is. The images of the run stay the recipe's at
    its own micro-batch, so `train.steps` follows the batch. Activations are profiled at two
    micro-batches and taken as linear between them, which is never too few.

    Args:
        recipe: its name, or the path of a file.
        hardware: the name of a profile, or one.
        nodes: machines.
        gpus_per_node: ranks of each.
        strategy: of `STRATEGIES`; all unless given.
        overrides: `section.key=value`.

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
    )
    fixed = dict(override.split("=", 1) for override in overrides)
    choices = list(_choices(own, fixed, strategy))
    micros = sorted({micro for _, _, micro, _ in choices})
    low, high = profile_of(own.config, micros[0]), profile_of(own.config, micros[-1])
    fitting: list[Plan] = []
    nearest: Plan | None = None
    for name, mode, micro, group in choices:
        values = {**fixed, **_values(own, mode, micro, group, fixed)}
        share = (micro - micros[0]) / max(1, micros[-1] - micros[0])
        try:
            found = plan(
                recipe,
                known,
                nodes=nodes,
                gpus_per_node=gpus_per_node,
                strategy=name,
                overrides=[f"{key}={value}" for key, value in values.items()],
                images=own.images,
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
    """The same configuration on the fewest nodes (a power of two) that it fits, if any does."""
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
    """Strategy, checkpointing, micro-batch, SyncBatchNorm group."""
    sharding, train = own.config.sharding, own.config.train
    names: Sequence[str] = [strategy] if strategy else list(STRATEGIES)
    if not strategy and fixed.keys() & {"sharding.strategy", "sharding.deepspeed_config"}:
        names = [own.strategy]
    modes: Sequence[str] = list(dict.fromkeys([sharding.activation_checkpointing, "none", "full"]))
    if fixed.keys() & {KEYS["checkpointing"], KEYS["groups"]}:
        modes = [sharding.activation_checkpointing]
    per_step = train.gradient_accumulation * own.world
    micros: Sequence[int] = sorted(
        {train.micro_batch_size, *[m for m in MICRO_BATCHES if m * per_step <= LARGEST_BATCH]}
    )
    if KEYS["micro"] in fixed:
        micros = [train.micro_batch_size]
    by_ranks: dict[int, int] = {}  # the recipe's way of saying a size goes first
    for size in (sharding.sync_bn_group_size, 0, own.gpus_per_node, 64):
        ranks = {0: own.world, -1: own.gpus_per_node}.get(size, size)
        if own.world % ranks == 0:
            by_ranks.setdefault(ranks, size)
    syncs: Sequence[int] = list(by_ranks.values())
    if KEYS["sync"] in fixed:
        syncs = [sharding.sync_bn_group_size]
    yield from itertools.product(names, modes, micros, syncs)


def _values(own: Plan, mode: str, micro: int, group: int, fixed: dict[str, str]) -> dict[str, str]:
    """Overrides of a choice, where it is not the recipe's own."""
    config, values = own.config, {}
    if mode != config.sharding.activation_checkpointing:
        values[KEYS["checkpointing"]] = mode
        if config.sharding.checkpoint_groups is not None:
            values[KEYS["groups"]] = "null"
    if micro != config.train.micro_batch_size:
        values[KEYS["micro"]] = str(micro)
        if KEYS["steps"] not in fixed:
            batch = micro * config.train.gradient_accumulation * own.world
            values[KEYS["steps"]] = str(math.ceil(own.images / batch))
    if group != config.sharding.sync_bn_group_size:
        values[KEYS["sync"]] = str(group)
    return values


def _between(low: ActivationProfile, high: ActivationProfile, share: float) -> ActivationProfile:
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
