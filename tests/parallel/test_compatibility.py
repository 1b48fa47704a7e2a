"""Combinations that cannot be: one sentence with key, value and what to do, before any model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from harness.jobs import RECIPES, ROOT
from seer_scale.config.ds_config import ds_config_of
from seer_scale.config.recipe import parse
from seer_scale.errors import ConfigError
from seer_scale.parallel.compatibility import PRECISIONS
from seer_scale.parallel.options import ShardingOptions
from seer_scale.train.build_engine import check_run, sharding_options


def check(
    *overrides: str,
    zero: dict[str, Any] | Path | None = None,
    world_size: int = 4,
    local_world_size: int = 2,
    folder: Path = Path(),
) -> None:
    """What launch/pretrain.py does with `--recipe debug OVERRIDES` before anything is built."""
    path: Path | None = zero if isinstance(zero, Path) else None
    if isinstance(zero, dict):
        path = folder / "zero.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
    option = [] if path is None else ["--deepspeed_config", str(path)]
    config = parse(["--recipe", "debug", *option, *overrides], recipes=RECIPES, ranks=1).config
    check_run(
        config,
        ds_config_of(config, world_size),
        world_size=world_size,
        local_world_size=local_world_size,
        cuda=False,
    )


CPU, NVME = {"device": "cpu"}, {"device": "nvme"}
REFUSED: list[tuple[list[str], dict[str, Any] | None, list[str]]] = [
    (
        ["sharding.sync_bn_group_size=8"],
        None,
        ["size is 8", "4 ranks", "to 1, 2 or 4, 0 for all"],
    ),
    (["sharding.strategy=hsdp", "sharding.shard_size=3"], None, ["shard_size is 3", "4 ranks"]),
    (["sharding.shard_size=2"], None, ["shard_size is 2", "strategy is ddp", "only hsdp reads"]),
    (["sharding.prefetch=3"], None, ["prefetch is 3", "fsdp or hsdp"]),
    (["sharding.strategy=fairscale"], None, ["strategy is fairscale", "sharding.strategy=fsdp"]),
    (
        ["sharding.strategy=fairscale", "model.align_channels=8"],
        None,
        ["align_channels is 8", "strategy is fairscale", "strategy=fsdp", "align_channels=1"],
    ),
    (["sharding.syncbn=apex"], None, ["syncbn is apex", "sharding.syncbn=native"]),
    (["train.precision=apex-o1"], None, ["precision is apex-o1", "train.precision=amp-o1"]),
    (
        ["sharding.activation_checkpointing=groups", "sharding.checkpoint_groups=[[1], []]"],
        None,
        ["has 2 lists", "regnety_debug has 3 stages"],
    ),
    (["train.compile=true"], {"stage": 3}, ["train.compile is true", "stage is 3", "=fsdp"]),
    ([], {"stage": 0, "offload_optimizer": CPU}, ["offload_optimizer", "stage is 0"]),
    ([], {"stage": 2, "offload_param": CPU}, ["offload_param", "stage is 2", "use stage 3"]),
    ([], {"stage": 2, "offload_optimizer": NVME}, ["nvme", "stage is 2"]),
    ([], {"stage": 3, "offload_optimizer": NVME}, ["nvme_path is missing"]),
    (
        [],
        {"stage": 3, "offload_optimizer": {**NVME, "nvme_path": "/proc/no/such"}},
        ["offload_optimizer.nvme_path is /proc/no/such", "nothing can be written"],
    ),
    (
        ["train.precision=amp-o1"],
        {"stage": 3, "offload_optimizer": {**NVME, "nvme_path": "."}},
        ["amp-o1", "nvme", "train.precision=bf16"],
    ),
    (["optim.fuse_backward=true"], None, ["fuse_backward is true", "buckets", "4 ranks"]),
    (["optim.fuse_backward=true"], {"stage": 3}, ["fuse_backward is true", "zero reduces"]),
    (
        ["optim.fuse_backward=true", "sharding.strategy=fsdp", "train.gradient_accumulation=2"],
        None,
        ["fuse_backward is true", "gradient_accumulation is 2"],
    ),
    (
        ["optim.fuse_backward=true", "sharding.strategy=fsdp", "train.precision=amp-o1"],
        None,
        ["fuse_backward is true", "precision is amp-o1"],
    ),
    (
        ["optim.fuse_backward=true", "sharding.strategy=fsdp", "train.max_nonfinite=3"],
        None,
        ["max_nonfinite is 3", "fuse_backward is true", "train.max_nonfinite=1"],
    ),
    (
        ["train.on_spike=skip"],
        {"stage": 3, "offload_optimizer": {**NVME, "nvme_path": "."}},
        ["on_spike is skip", "nvme", "train.on_spike=rewind"],
    ),
    (["optim.momentum_on_host=true"], {"stage": 2}, ["momentum_on_host", "offload_optimizer"]),
]


@pytest.mark.parametrize(("overrides", "zero", "fragments"), REFUSED, ids=str)
def test_impossible_pair_is_refused_in_a_sentence(
    overrides: list[str], zero: dict[str, Any] | None, fragments: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as raised:
        check(*overrides, zero=zero, folder=tmp_path)
    sentence = str(raised.value)
    assert "\n" not in sentence
    assert all(fragment in sentence for fragment in fragments), sentence


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "hsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-o1"])
def test_what_the_table_allows_passes(strategy: str, precision: str) -> None:
    assert precision in PRECISIONS[strategy]
    check(f"sharding.strategy={strategy}", f"train.precision={precision}")


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_ds_config_passes(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deepspeed")
    from seer_scale.parallel.zero import missing_for_nvme

    if path.stem == "zero3_nvme" and missing_for_nvme():
        pytest.skip(f"nvme: {missing_for_nvme()}")
    monkeypatch.chdir(tmp_path)  # its nvme_path is relative
    check(zero=path)


@pytest.mark.parametrize(
    ("overrides", "fragments"),
    [
        (["train.precision=bf16"], ["syncbn is apex", "precision is bf16"]),
        (["sharding.activation_checkpointing=full"], ["syncbn is apex", "is full", "twice"]),
    ],
)
def test_apex_layer_has_its_limits(
    overrides: list[str], fragments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from seer_scale.parallel import apex

    monkeypatch.setattr(apex, "missing_syncbn", lambda *, cuda: None)  # as where Apex is
    check("sharding.syncbn=apex")
    with pytest.raises(ConfigError) as raised:
        check("sharding.syncbn=apex", *overrides)
    assert all(fragment in str(raised.value) for fragment in fragments)


def test_fairscale_recomputes_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    from seer_scale.parallel import fairscale

    monkeypatch.setattr(fairscale, "missing", lambda *, cuda: None)  # as where FairScale is
    check("sharding.strategy=fairscale", "sharding.activation_checkpointing=full")
    with pytest.raises(ConfigError, match="groups, but FairScale loses its state"):
        check(
            "sharding.strategy=fairscale",
            "sharding.activation_checkpointing=groups",
            "sharding.checkpoint_groups=[[1], [2], []]",
        )


def test_apex_o1_goes_with_stage_0_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seer_scale.parallel import apex

    # As on a machine that has Apex: the rule after that one.
    monkeypatch.setattr(apex, "missing_amp", lambda *, cuda: None)
    check("train.precision=apex-o1", zero={"stage": 0}, folder=tmp_path)
    for overrides, zero, fragments in (
        ([], {"stage": 1}, ["stage is 1", "ds_configs/zero0.json"]),
        (["sharding.strategy=fsdp"], None, ["fsdp takes fp32, bf16 or amp-o1"]),
    ):
        with pytest.raises(ConfigError) as raised:
            check("train.precision=apex-o1", *overrides, zero=zero, folder=tmp_path)
        assert all(fragment in str(raised.value) for fragment in fragments)


def test_options_without_values_are_those_of_a_recipe_without_keys() -> None:
    config = parse(["--recipe", "debug"], recipes=RECIPES, ranks=1).config
    section = type(config.sharding).model_validate({})
    plain = config.model_copy(update={"sharding": section})
    assert sharding_options(plain) == ShardingOptions()
