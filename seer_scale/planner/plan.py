"""Plans a run before you pay for it: memory, traffic, time and cost of a configuration.

This module alone of the planner knows the configuration of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from seer_scale.config import RunConfig, schema
from seer_scale.config import recipe as recipes
from seer_scale.config.completion import divisors_of
from seer_scale.config.ds_config import ds_config_of, offload_device
from seer_scale.config.sharding_section import ShardingSection
from seer_scale.config.shipped import RECIPES
from seer_scale.config.training_sections import ModelSection, ObjectiveSection
from seer_scale.errors import ConfigError, did_you_mean
from seer_scale.models.regnet import trunk_config
from seer_scale.optim.options import OptimizerOptions
from seer_scale.parallel.activation_profile import ActivationProfile
from seer_scale.parallel.compatibility import check_sharding, check_skips, steps_one_by_one
from seer_scale.parallel.options import ShardingOptions
from seer_scale.parallel.precision import gathered_as, held_as
from seer_scale.parallel.zero_limits import with_limits
from seer_scale.performance.flops import count_flops
from seer_scale.performance.hardware import Hardware, load_hardware
from seer_scale.performance.profiler import check_ranks
from seer_scale.performance.shape import FLOAT
from seer_scale.planner.communication import bytes_by_kind, messages
from seer_scale.planner.host_time import host_seconds
from seer_scale.planner.job import Batch, Layout, Sinkhorn, Zero
from seer_scale.planner.memory import memory_of
from seer_scale.planner.model import Model, profile_of, recomputed_regions, shape_of
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
    changes: Mapping[str, Mapping[str, Any]] | None = None,
    images: int | None = None,
    profile: ActivationProfile | None = None,
) -> Plan:
    """Plans a run; takes seconds on a laptop, also for RG-10B on thousands of GPUs.

    Args:
        recipe: name of a recipe, path of a recipe file, or a resolved configuration.
        hardware: name of a hardware profile, path of one, or the profile itself.
        nodes: number of machines.
        gpus_per_node: ranks on each machine.
        strategy: a key of `STRATEGIES`; None means the strategy of the recipe.
        overrides: `section.key=value` texts, for a recipe by name or path.
        changes: section -> key -> value, for a resolved configuration.
        images: images of the whole run, in place of the recipe's `train.images`.
        profile: activations of a micro-batch, if the caller knows them.

    Raises:
        ConfigError: an unknown name or key, or a combination that cannot be trained.
    """
    for name, count in (("nodes", nodes), ("gpus_per_node", gpus_per_node)):
        if count < 1:
            raise ConfigError(f"{name} is {count}, but must be an integer > 0")
    known = hardware if isinstance(hardware, Hardware) else load_hardware(hardware)
    ranks = nodes * gpus_per_node
    if images is not None:
        overrides = (*overrides, f"train.images={images}")
    config, arguments, notes = _configure(recipe, strategy, overrides, changes or {}, ranks)
    ds_config = ds_config_of(config, ranks) or {}
    _check(config, known, ds_config, nodes=nodes, gpus_per_node=gpus_per_node)
    peak = known.peak(config.train.precision)  # refuses a precision that the hardware lacks
    assert peak > 0
    batch = _batch_of(config)
    model = _model_of(config.model)
    shape = shape_of(model, config.sharding.unit_parameters)
    zero = with_limits(
        ds_config.get("zero_optimization", {}), max(block.whole for block in shape.blocks)
    )
    layout = _layout_of(config.sharding, batch, zero, nodes, gpus_per_node)
    profile = profile or profile_of(model, batch, batch.micro_batch_size, layout.strategy)
    again = recomputed_regions(
        shape,
        profile,
        config.sharding.activation_checkpointing,
        groups=config.sharding.checkpoint_groups,
        budget_gib=config.sharding.activation_budget,
    )
    recomputed = frozenset(block for region in again for block in region)
    trunk = trunk_config(model.trunk)
    flops = count_flops(
        trunk,
        crop_sizes=batch.crop_sizes,
        crop_counts=batch.crop_counts,
        head_dims=model.head_dims,
        prototypes=model.prototypes,
        recomputed=recomputed,
    )
    memory = memory_of(
        shape,
        profile,
        again,
        layout,
        gradient_accumulation=config.train.gradient_accumulation,
        momentum_on_host=config.optim.momentum_on_host,
        fuse_backward=config.optim.fuse_backward,
        on_touch=known.on_touch,
    )
    found = messages(
        shape,
        layout,
        batch,
        prototypes=model.prototypes,
        sinkhorn=_sinkhorn_of(config.objective),
        recomputed=recomputed,
    )
    time = step_time(
        trunk,
        flops,
        batch,
        known,
        found,
        recomputed=recomputed,
        held_parameters=shape.total / (layout.shards if layout.is_sharded else 1),
        on_host=host_seconds(shape, layout, batch, recomputed),
    )
    return Plan(
        config.recipe,
        arguments,
        known,
        hardware if isinstance(hardware, str) else hardware.name,
        layout,
        batch,
        model,
        config.sharding.activation_checkpointing,
        config.sharding.checkpoint_groups,
        config.train.images,
        config.train.steps,
        shape,
        recomputed,
        flops,
        memory,
        bytes_by_kind(found),
        time,
        notes,
    )


def _configure(
    recipe: str | RunConfig,
    strategy: str | None,
    overrides: Sequence[str],
    changes: Mapping[str, Mapping[str, Any]],
    ranks: int,
) -> tuple[RunConfig, tuple[str, ...], tuple[str, ...]]:
    """The configuration, the arguments of `seer-scale pretrain` that give it, and its notes."""
    if strategy is not None and strategy not in STRATEGIES:
        raise ConfigError(
            f"there is no strategy {strategy!r}{did_you_mean(strategy, STRATEGIES) or ':'} "
            f"the planner knows {', '.join(STRATEGIES)}"
        )
    more = STRATEGIES[strategy] if strategy else ()
    if isinstance(recipe, str):
        if changes:
            raise ConfigError("changes go with a resolved configuration: give overrides instead")
        arguments = ("--recipe", recipe, *more, *overrides)
        parsed = recipes.parse(arguments, recipes=RECIPES, ranks=ranks)
        return parsed.config, arguments, parsed.notes
    if overrides:
        raise ConfigError("overrides go with the name of a recipe: give changes instead")
    if not (more or changes):
        return recipe, ("--recipe", recipe.recipe), ()
    values = recipe.model_dump()
    for section, keys in changes.items():
        values[section] |= keys
    if strategy:
        path = more[1] if more[0] == "--deepspeed_config" else None
        values["sharding"] |= {"strategy": "zero" if path else strategy, "deepspeed_config": path}
    config = schema.validate(values, sources={}, recipe=recipe.recipe)
    return config, ("--recipe", recipe.recipe, *more), ()


def _check(
    config: RunConfig,
    hardware: Hardware,
    ds_config: dict[str, Any],
    *,
    nodes: int,
    gpus_per_node: int,
) -> None:
    sharding, world = config.sharding, nodes * gpus_per_node
    if sharding.strategy == "fairscale":
        raise ConfigError(
            "sharding.strategy is fairscale, which the planner does not know: plan with fsdp, "
            "FairScale's successor in torch"
        )
    for section in ("offload_optimizer", "offload_param"):
        device = offload_device(ds_config.get("zero_optimization", {}), section)
        if device != "none":
            raise ConfigError(
                f"{sharding.deepspeed_config}: zero_optimization.{section}.device is {device}, but "
                "the planner does not know offload: plan with the DeepSpeed config of the same "
                "stage without offload"
            )
    optim, train = config.optim, config.train
    optimizer = OptimizerOptions(
        fuse_backward=optim.fuse_backward, momentum_on_host=optim.momentum_on_host
    )
    check_skips(
        max_nonfinite=train.max_nonfinite,
        on_spike=train.on_spike,
        one_by_one=steps_one_by_one(optimizer, ds_config),
    )
    if config.profile.steps is not None:
        check_ranks(config.profile.ranks, world)
    check_sharding(
        ShardingOptions(
            # Apex must be installed where the run starts, not where the run is planned.
            **{**sharding.model_dump(), "syncbn": "native"},
            align_channels=config.model.align_channels,
            compile=train.compile,
            gradient_accumulation=train.gradient_accumulation,
        ),
        optimizer,
        ds_config,
        trunk=config.model.trunk,
        precision=train.precision.replace("apex-o1", "amp-o1"),
        world_size=world,
        local_world_size=gpus_per_node,
        cuda=hardware.generation != "CPU",
    )
    group = sharding.sync_bn_group_size
    if group > 0 and world % group:
        raise ConfigError(
            f"sharding.sync_bn_group_size is {group}, which does not divide the {world} ranks: "
            f"the last group would be smaller than the others; set it to {divisors_of(world)}, to "
            "0 for all ranks or to -1 for the ranks of a node"
        )


def _layout_of(
    sharding: ShardingSection,
    batch: Batch,
    zero: dict[str, Any],
    nodes: int,
    gpus_per_node: int,
) -> Layout:
    sent, held = (
        as_type(sharding.strategy, batch.precision, compiled=batch.compiled)
        for as_type in (gathered_as, held_as)
    )
    shards = {"ddp": 1, "hsdp": sharding.shard_size or gpus_per_node}
    return Layout(
        sharding.strategy,
        nodes,
        gpus_per_node,
        shards.get(sharding.strategy, nodes * gpus_per_node),
        sharding.sync_bn_group_size,
        sharding.reshard_after_forward,
        sharding.prefetch,
        Zero.read(zero),
        sent.itemsize if sent else FLOAT,
        held.itemsize if held else FLOAT,
    )


def _batch_of(config: RunConfig) -> Batch:
    train, data = config.train, config.data
    return Batch(
        train.micro_batch_size,
        train.gradient_accumulation,
        data.crop_sizes,
        data.crop_counts,
        train.precision,
        train.compile,
    )


def _model_of(model: ModelSection) -> Model:
    return Model(model.trunk, model.head_dims, model.head_batch_norm, model.prototypes)


def _sinkhorn_of(objective: ObjectiveSection) -> Sinkhorn | None:
    if objective.name != "swav":
        return None
    options = objective.options
    return Sinkhorn(
        int(options.get("sinkhorn_iterations", 3)), len(options.get("assign_crops", (0, 1)))
    )
