"""Keys of a recipe that reach the optimizer and the engine: each under a value of its own."""

from __future__ import annotations

import pytest

from harness.jobs import ROOT, arguments
from seer_scale.config.recipe import parse
from seer_scale.config.run_config import RunConfig
from seer_scale.optim.options import OptimizerOptions
from seer_scale.parallel.options import ShardingOptions
from seer_scale.train.build_engine import optimizer_options, sharding_options


def config(*more: str) -> RunConfig:
    return parse(
        arguments("images", "run", *more), recipes=ROOT / "launch" / "recipes", ranks=1
    ).config


def test_keys_of_the_optimizer_reach_it() -> None:
    asked = (
        *("optim.momentum=0.8", "optim.weight_decay=3e-4", "optim.trust_coefficient=0.02"),
        *("optim.fuse_backward=true", "optim.momentum_on_host=true"),
    )
    assert optimizer_options(config(*asked)) == OptimizerOptions(
        momentum=0.8,
        nesterov=False,  # the key is gone
        weight_decay=3e-4,
        trust_coefficient=0.02,
        fuse_backward=True,
        momentum_on_host=True,
    )


@pytest.mark.parametrize(("larc", "coefficient"), [("true", 0.02), ("false", None)])
def test_larc_is_a_choice(larc: str, coefficient: float | None) -> None:
    chosen = config(f"optim.larc={larc}", "optim.trust_coefficient=0.02")
    assert optimizer_options(chosen).trust_coefficient == coefficient


def test_keys_of_sharding_reach_the_engine() -> None:
    asked = (
        *("sharding.strategy=hsdp", "sharding.shard_size=4", "sharding.prefetch=3"),
        *("sharding.reshard_after_forward=false", "sharding.unit_parameters=77"),
        *("sharding.activation_checkpointing=groups", "sharding.checkpoint_groups=[[2],[],[1]]"),
        *("sharding.syncbn=apex", "sharding.sync_bn_group_size=2", "model.align_channels=8"),
        *("train.compile=true", "train.gradient_accumulation=5"),
    )
    assert sharding_options(config(*asked)) == ShardingOptions(
        strategy="hsdp",
        deepspeed_config=None,
        shard_size=4,
        reshard_after_forward=False,
        prefetch=3,
        unit_parameters=77,
        activation_checkpointing="groups",
        checkpoint_groups=((2,), (), (1,)),
        syncbn="apex",
        sync_bn_group_size=2,
        align_channels=8,
        compile=True,
        gradient_accumulation=5,
    )
