"""DeepSpeed's JSON: what the recipe fills in, and every way to contradict it."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from seer_scale.config import RunConfig, ds_config
from seer_scale.config.ds_config import load_ds_config, resolve_ds_config
from seer_scale.config.recipe import parse
from seer_scale.config.schema import shown
from seer_scale.errors import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch" / "recipes"
FILES = sorted((ROOT / "ds_configs").glob("*.json"))


def recipe(name: str, *overrides: str, ranks: int = 2) -> RunConfig:
    arguments = ["--recipe", name, "--deepspeed_config", "zero.json", *overrides]
    return parse(arguments, recipes=RECIPES, ranks=ranks).config


def resolve(
    raw: dict[str, Any], *overrides: str, name: str = "demo", world_size: int = 2
) -> dict[str, Any]:
    train = recipe(name, *overrides, ranks=world_size).train
    return resolve_ds_config(
        raw,
        path="zero.json",
        micro_batch_size=train.micro_batch_size,
        gradient_accumulation=train.gradient_accumulation,
        world_size=world_size,
    )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_file_resolves_for_every_recipe(path: Path, name: str) -> None:
    resolved = resolve(load_ds_config(path), name=name, world_size=64)
    train = recipe(name, ranks=64).train
    assert resolved["train_micro_batch_size_per_gpu"] == train.micro_batch_size
    assert resolved["gradient_accumulation_steps"] == train.gradient_accumulation
    assert resolved["train_batch_size"] == train.global_batch
    assert resolved["gradient_clipping"] == 0.0
    assert resolved["torch_autocast"] == {"enabled": False}


def test_files_differ_in_their_stage_and_offload_only() -> None:
    stages, offloads, rest = {}, {}, []
    for path in FILES:
        zero = load_ds_config(path)["zero_optimization"]
        stages[path.stem] = zero.pop("stage")
        offloads[path.stem] = [
            zero.pop(key, {}).get("device") for key in ("offload_optimizer", "offload_param")
        ]
        rest.append(zero)
    assert all(each == rest[0] for each in rest)
    assert stages == {stem: int(stem[4]) for stem in stages}
    assert offloads == {
        **{f"zero{stage}": [None, None] for stage in range(4)},
        **{f"zero{stage}_offload": ["cpu", None] for stage in (1, 2)},
        "zero3_offload": ["cpu", "cpu"],
        "zero3_nvme": ["nvme", "nvme"],
    }


def test_readme_explains_every_key_and_file() -> None:
    readme = (ROOT / "ds_configs" / "README.md").read_text()
    shared = resolve({"zero_optimization": {"stage": 0}})
    keys = {key for path in FILES for key in load_ds_config(path)["zero_optimization"]}
    for key in [*keys, *shared, *(path.name for path in FILES)]:
        assert f"`{key}`" in readme


def test_recipe_fills_in_what_it_owns() -> None:
    raw = {"zero_optimization": {"stage": 2}, "wall_clock_breakdown": True}
    before = copy.deepcopy(raw)
    shares = ("train.micro_batch_size=32", "train.gradient_accumulation=3")
    resolved = resolve(raw, *shares, world_size=4)
    assert raw == before
    assert resolved == {
        "zero_optimization": {"stage": 2, "compute_grad_norm": False},
        "wall_clock_breakdown": True,
        "train_micro_batch_size_per_gpu": 32,
        "gradient_accumulation_steps": 3,
        "train_batch_size": 384,
        "gradient_clipping": 0.0,
        "torch_autocast": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "managed_gradient_accumulation": True,
        "gradient_allreduce_op": "mean",
    }


@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-o1"])
def test_precision_is_left_to_the_model(precision: str) -> None:
    resolved = resolve({"zero_optimization": {"stage": 3}}, f"train.precision={precision}")
    assert resolved["torch_autocast"] == {"enabled": False}
    assert not resolved.keys() & {"bf16", "fp16", "amp"}


def test_auto_agreement_and_switched_off_sections_are_no_contradiction() -> None:
    shared = resolve({"zero_optimization": {"stage": 1}})
    assert resolve({**shared, "train_batch_size": "auto", "bf16": {"enabled": False}}) == shared


@pytest.mark.parametrize(
    ("key", "value", "fragments"),
    [
        ("train_micro_batch_size_per_gpu", 16, ["16", "32", "train.micro_batch_size is 32"]),
        ("gradient_accumulation_steps", 4, ["4", "1", "train.gradient_accumulation is 1"]),
        ("train_batch_size", 256, ["256", "64", "32 * train.gradient_accumulation 1 * 2 ranks"]),
        ("gradient_clipping", 1.0, ["1.0", "0.0", "SEER clips nothing"]),
        ("torch_autocast", {"enabled": True}, ["true", "false", "train.precision"]),
        ("zero_allow_untested_optimizer", False, ["false", "true", "its own optimizer"]),
        ("zero_force_ds_cpu_optimizer", True, ["true", "false", "its own optimizer"]),
        ("managed_gradient_accumulation", False, ["false", "true", "after every micro-batch"]),
        ("gradient_allreduce_op", "sum", ["sum", "mean", "mean over the global batch"]),
    ],
)
def test_contradiction_names_both_values(key: str, value: Any, fragments: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve({"zero_optimization": {"stage": 2}, key: value})
    for fragment in [f"zero.json: {key} is", *fragments, "leave it out"]:
        assert fragment in str(raised.value)


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("optimizer", "LARC is exact"),
        ("scheduler", "optim.*"),
        ("fp16", "train.precision"),
        ("bf16", "BatchNorm"),
        ("bfloat16", "BatchNorm"),
        ("amp", "train.precision"),
        ("data_types", "train.precision"),
        ("activation_checkpointing", "sharding.activation_checkpointing"),
        ("data_efficiency", "run.seed"),
        ("pipeline", "no use"),
        ("tensor_parallel", "no use"),
        ("expert_parallel", "no use"),
        ("hybrid_engine", "no use"),
        ("weight_quantization", "no use"),
    ],
)
def test_sections_of_the_recipe_are_refused(key: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"zero\.json: {key} is refused: .*{re.escape(reason)}"):
        resolve({"zero_optimization": {"stage": 2}, key: {"enabled": True}})


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({}, r"zero_optimization\.stage is missing"),
        ({"zero_optimization": True}, r"zero_optimization\.stage is missing"),
        ({"zero_optimization": {"stage": 4}}, r"stage is 4, but must be 0, 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, r'stage is "2", but must be 0, 1, 2 or 3'),
        ({"zero_optimization": {"stage": True}}, r"stage is true, but must be 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"stage": 3, "overlap_com": True}},
            r"zero_optimization\.overlap_com is not a key of DeepSpeed: did you mean overlap_comm",
        ),
        ({"train_batchsize": 3}, r"train_batchsize is not a key .*did you mean train_batch_size"),
    ],
)
def test_unknown_keys_and_stages(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        resolve(raw)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"a": 1\n "b": 2}', r"not valid JSON: .*line 2, column 2"),
        ("", r"not valid JSON"),
        ("[1]", r"holds \[1\], but must hold an object"),
        ('{"a": 1, "a": 2}', r"a is given 2 times"),
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', r"stage is given 2 times"),
        (b"\xff{}", r"not UTF-8"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str | bytes, sentence: str) -> None:
    path = tmp_path / "zero.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=sentence) as raised:
        load_ds_config(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_file_that_begins_with_the_mark_of_its_encoding(tmp_path: Path, encoding: str) -> None:
    """Windows' editors write such files, and PowerShell's redirection does."""
    path = tmp_path / "zero.json"
    path.write_text('{"zero_optimization": {"stage": 2}}', encoding=encoding)
    assert load_ds_config(path) == {"zero_optimization": {"stage": 2}}


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json: No such file"):
        load_ds_config(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("key", "value", "takes"),
    [
        ("reduce_bucket_size", "5e7", "an integer >= 1"),
        ("reduce_bucket_size", 0, "an integer >= 1"),
        ("allgather_bucket_size", 1.5, "an integer >= 1"),
        ("stage3_prefetch_bucket_size", True, "an integer >= 0"),
        ("stage3_param_persistence_threshold", -1, "an integer >= 0"),
        ("stage3_max_live_parameters", None, "an integer >= 0"),
        ("stage3_max_reuse_distance", float("inf"), "an integer >= 0"),
        ("overlap_comm", "true", "true or false"),
        ("contiguous_gradients", 1, "true or false"),
        ("reduce_scatter", None, "true or false"),
        ("offload_param", True, "an object whose device is cpu, nvme or none"),
        ("offload_optimizer", {"device": "gpu"}, "an object whose device is cpu, nvme or none"),
        ("offload_optimizer", {}, "an object whose device is cpu, nvme or none"),
        ("offload_param", {"device": ["cpu"]}, "an object whose device is cpu, nvme or none"),
        ("offload_optimizer", {"device": "cpu", "ratio": 0.5}, "an object whose ratio is 1"),
    ],
)
def test_wrong_types(key: str, value: Any, takes: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve({"zero_optimization": {"stage": 3, key: value}})
    sentence = str(raised.value)
    assert f"zero.json: zero_optimization.{key} is {shown(value)}, but must be {takes}" in sentence
    assert "leave it out" in sentence


def test_what_deepspeed_takes_is_accepted() -> None:
    zero = {
        "stage": 3,
        "reduce_bucket_size": 5e7,
        "allgather_bucket_size": "auto",
        "stage3_param_persistence_threshold": 0,
        "overlap_comm": False,
        "offload_param": {"device": "cpu", "pin_memory": True},
        "offload_optimizer": {"device": "none"},
    }
    assert resolve({"zero_optimization": zero})["zero_optimization"] == zero


def test_key_lists_match_the_installed_deepspeed() -> None:
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    accepted = {field.alias or name for name, field in fields.items()}
    assert set(ds_config.ZERO_KEYS) <= accepted
    typed = {*ds_config.ZERO_INTEGERS, *ds_config.ZERO_BOOLEANS, *ds_config.ZERO_OFFLOADS}
    assert typed <= set(ds_config.ZERO_KEYS)
    assert not set(_REMOVED_TOP_LEVEL_CONFIG_KEYS) & set(ds_config.DEEPSPEED_KEYS)
