"""Plans a run before it is paid for: memory, traffic, time and cost of a configuration."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch

from seer_scale.config import recipe as recipes
from seer_scale.config import schema
from seer_scale.config.ds_config import load_ds_config, resolve_ds_config
from seer_scale.config.run_config import ModelSection, RunConfig
from seer_scale.config.shipped import RECIPES
from seer_scale.errors import ConfigError
from seer_scale.models import MultiCropModel, build_model
from seer_scale.models.regnet import trunk_config
from seer_scale.parallel.activation_budget import fewest_recomputed, least_budget
from seer_scale.parallel.activation_profile import ActivationProfile, profile_activations
from seer_scale.parallel.compatibility import check_sharding
from seer_scale.performance.flops import count_flops
from seer_scale.performance.hardware import Hardware, load_hardware
from seer_scale.performance.shape import Shape, regions, shape_of
from seer_scale.planner.communication import bytes_by_kind, messages
from seer_scale.planner.memory import GIB, memory_of
from seer_scale.planner.planned import Plan
from seer_scale.planner.step_time import step_time

# Name -> arguments of `seer-scale pretrain`.
STRATEGIES: dict[str, tuple[str, ...]] = {
    **{name: (f"sharding.strategy={name}",) for name in ("ddp", "fsdp", "hsdp")},
    **{f"zero{n}": ("--deepspeed_config", f"ds_configs/zero{n}.json") for n in range(4)},
}


def plan(
    recipe: str | RunConfig,
    hardware: str | Hardware,
    *,
    nodes: int,
    gpus_per_node: int,
    strategy: str | None = None,
    overrides: Sequence[str] = (),
    images: float | None = None,
    profile: ActivationProfile | None = None,
) -> Plan:
    """Plans a run; seconds on a laptop, for RG-10B on thousands of GPUs too.

    Args:
        recipe: its name, the path of a file, or a resolved configuration.
        hardware: the name of a profile, or one.
        nodes: machines.
        gpus_per_node: ranks of each.
        strategy: of `STRATEGIES`; the recipe's own unless given.
        overrides: `section.key=value`, for a recipe by name.
        images: of the whole run; the recipe's steps at this world's batch unless given.
        profile: of a micro-batch's activations, if the caller knows it.

    Raises:
        ConfigError: an unknown name or key, or a combination that cannot be trained.
    """
    for name, count in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if count < 1:
            raise ConfigError(f"{name} is {count}, but must be an integer > 0")
    known = hardware if isinstance(hardware, Hardware) else load_hardware(hardware)
    config, arguments = _configure(recipe, strategy, overrides)
    world = nodes * gpus_per_node
    zero = _zero_of(config, world)
    _check(config, known, zero, world=world, per_node=gpus_per_node)
    peak = known.peak(config.train.precision)  # refuses a precision that the hardware lacks
    assert peak > 0
    shape = shape_of(config.model, config.sharding.unit_parameters)
    profile = profile or profile_of(config, config.train.micro_batch_size)
    again = _regions(config, shape, profile)
    recomputed = frozenset(block for region in again for block in region)
    trunk = trunk_config(config.model.trunk)
    flops = count_flops(
        trunk,
        crop_sizes=config.data.crop_sizes,
        crop_counts=config.data.crop_counts,
        head_dims=config.model.head_dims,
        prototypes=config.model.prototypes,
        recomputed=recomputed,
    )
    section = zero.get("zero_optimization", {})
    shards = _shards(config, world, gpus_per_node)
    memory = memory_of(
        shape,
        profile,
        again,
        config,
        shards=shards,
        world=world,
        zero=section,
        on_touch=known.on_touch,
    )
    found = messages(shape, config, nodes=nodes, gpus_per_node=gpus_per_node, zero=section)
    whole = shards == 1 or (config.sharding.strategy == "zero" and section.get("stage") == 0)
    time = step_time(
        trunk,
        flops,
        config,
        known,
        found,
        recomputed=recomputed,
        held_parameters=shape.total / (1 if whole else shards),
    )
    train = config.train
    batch = train.micro_batch_size * train.gradient_accumulation * world
    return Plan(
        config,
        arguments,
        known,
        hardware if isinstance(hardware, str) else hardware.name,
        _name_of(config, section),
        nodes,
        gpus_per_node,
        images or train.steps * batch,
        shape,
        recomputed,
        flops,
        memory,
        bytes_by_kind(found),
        time,
    )


def profile_of(config: RunConfig, micro_batch_size: int) -> ActivationProfile:
    """The activations of a micro-batch of so many images, remembered."""
    data = config.data
    crops = tuple(
        (count * micro_batch_size, size)
        for count, size in zip(data.crop_counts, data.crop_sizes, strict=True)
    )
    return _profile(config.model, crops, config.train.precision)


@cache
def _profile(
    model: ModelSection, crops: tuple[tuple[int, int], ...], precision: str
) -> ActivationProfile:
    return profile_activations(partial(_build, model), crops, precision)


def _build(model: ModelSection, device: torch.device) -> MultiCropModel:
    return build_model(
        model.trunk,
        head_dims=model.head_dims,
        head_batch_norm=model.head_batch_norm,
        prototypes=model.prototypes,
        device=device,
    )


def _configure(
    recipe: str | RunConfig, strategy: str | None, overrides: Sequence[str]
) -> tuple[RunConfig, tuple[str, ...]]:
    if strategy is not None and strategy not in STRATEGIES:
        raise ConfigError(
            f"there is no strategy {strategy!r}{schema.did_you_mean(strategy, STRATEGIES) or ':'} "
            f"the planner knows {', '.join(STRATEGIES)}"
        )
    more = STRATEGIES[strategy] if strategy else ()
    if isinstance(recipe, str):
        arguments = ("--recipe", recipe, *more, *overrides)
        return recipes.parse(arguments, recipes=RECIPES).config, arguments
    if overrides:
        raise ConfigError("overrides go with a recipe's name: a RunConfig is resolved already")
    if not more:
        return recipe, ("--recipe", recipe.recipe)
    values = recipe.model_dump()
    own, path = values["sharding"]["strategy"], None
    if more[0] == "--deepspeed_config":
        own, path = "zero", more[1]
    else:
        own = str(strategy)
    values["sharding"] |= {"strategy": own, "deepspeed_config": path}
    config = schema.validate(values, sources={}, recipe=recipe.recipe)
    return config, ("--recipe", recipe.recipe, *more)


def _zero_of(config: RunConfig, world: int) -> dict[str, Any]:
    """The resolved DeepSpeed configuration, or nothing."""
    path = config.sharding.deepspeed_config
    if path is None:
        return {}
    return resolve_ds_config(load_ds_config(path), path=path, config=config, world_size=world)


def _check(
    config: RunConfig, hardware: Hardware, zero: dict[str, Any], *, world: int, per_node: int
) -> None:
    sharding = config.sharding
    if sharding.strategy == "fairscale":
        raise ConfigError(
            "sharding.strategy is fairscale, which the planner does not know: plan with fsdp, its "
            "successor in torch"
        )
    for section in ("offload_optimizer", "offload_param"):
        device = (zero.get("zero_optimization", {}).get(section) or {}).get("device", "none")
        if device != "none":
            raise ConfigError(
                f"{sharding.deepspeed_config}: zero_optimization.{section}.device is {device}, but "
                "the planner does not know offload: plan with the file that has none"
            )
    # Apex has to be there when the run starts, not here.
    here = config.model_copy(
        update={
            "sharding": sharding.model_copy(update={"syncbn": "native"}),
            "train": config.train.model_copy(
                update={"precision": config.train.precision.replace("apex-o1", "amp-o1")}
            ),
        }
    )
    gpu = hardware.generation != "CPU"
    check_sharding(here, zero, world_size=world, local_world_size=per_node, cuda=gpu)
    group = sharding.sync_bn_group_size
    if group > 0 and world % group:
        raise ConfigError(
            f"sharding.sync_bn_group_size is {group}, which does not divide the {world} ranks: the "
            "last group would be smaller than the others; set it to a divisor, 0 for all or -1 for "
            "a node's"
        )


def _regions(
    config: RunConfig, shape: Shape, profile: ActivationProfile
) -> tuple[tuple[int, ...], ...]:
    sharding = config.sharding
    chosen: frozenset[int] = frozenset()
    if sharding.activation_budget is not None:
        fewest = fewest_recomputed(profile, int(sharding.activation_budget * GIB))
        if fewest is None:
            raise ConfigError(
                f"sharding.activation_checkpointing is {sharding.activation_checkpointing}, but "
                "the activations of a micro-batch take at least "
                f"{least_budget(profile) / GIB + 5e-4:.3f} GiB, whatever is recomputed: allow more "
                "or lower train.micro_batch_size"
            )
        chosen = fewest
    return regions(
        sharding.activation_checkpointing, shape.depths, sharding.checkpoint_groups, chosen
    )


def _shards(config: RunConfig, world: int, per_node: int) -> int:
    if config.sharding.strategy == "ddp":
        return 1
    if config.sharding.strategy == "hsdp":
        return config.sharding.shard_size or per_node
    return world


def _name_of(config: RunConfig, zero: dict[str, Any]) -> str:
    own = config.sharding.strategy
    return f"zero{zero['stage']}" if own == "zero" else own
