"""launch/plan.py as users call it: figures, JSON, a search whose command starts, clear refusals."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seer_scale.commands import plan as command
from seer_scale.config.ds_config import load_ds_config, resolve_ds_config
from seer_scale.config.recipe import parse
from seer_scale.errors import ConfigError
from seer_scale.parallel.compatibility import check_sharding
from seer_scale.planner import plan

ROOT = Path(__file__).resolve().parents[2]
WHERE = ("--hardware", "a100_40gb", "--nodes", "1", "--gpus-per-node", "8")


def keep(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    file = tmp_path / "plan.json"
    assert command.main(["--json", str(file), *arguments]) == 0
    return dict(json.loads(file.read_text()))


def test_the_figures_of_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = keep(tmp_path, "--recipe", "debug", *WHERE, "--strategy", "fsdp", "--images", "1000000")
    assert found["parameters"].keys() == {"trunk", "head", "prototypes", "total"}
    assert found["parameters"]["total"] == sum(
        found["parameters"][part] for part in ("trunk", "head", "prototypes")
    )
    kinds = [
        "parameters",
        "gradients",
        "optimizer",
        "buffers",
        "activations",
        "communication",
        "gathered",
    ]
    gib = found["memory_gib_per_rank"]
    assert list(gib) == [*kinds, "total"]
    assert gib["total"] == pytest.approx(sum(gib[kind] for kind in kinds))
    assert found["fits"] is True
    assert found["step_seconds"] == pytest.approx(sum(found["step_seconds_by_term"].values()))
    assert found["images_per_second"] == pytest.approx(32 / found["step_seconds"])
    assert found["days"] == pytest.approx(1e6 / found["images_per_second"] / 86400)
    assert found["gpu_hours"] == pytest.approx(8 * 24 * found["days"])
    assert 0 < found["mfu"] < 1
    assert {"sharding", "gradients", "sync_batch_norm", "sinkhorn"} <= found[
        "bytes_per_step"
    ].keys()
    printed = capsys.readouterr().out
    assert "fits" in printed
    assert "torchrun --nnodes 1 --nproc_per_node 8 launch/pretrain.py --recipe debug" in printed


def accepted(line: str, *, nodes: int, gpus: int) -> Any:
    """The configuration that a printed command gives, checked as launch/pretrain.py checks it."""
    words = shlex.split(line)
    config = parse(
        words[words.index("launch/pretrain.py") + 1 :], recipes=ROOT / "launch" / "recipes"
    ).config
    zero = None
    if path := config.sharding.deepspeed_config:
        zero = resolve_ds_config(
            load_ds_config(ROOT / path), path=path, config=config, world_size=nodes * gpus
        )
    check_sharding(config, zero, world_size=nodes * gpus, local_world_size=gpus, cuda=True)
    return config


def test_a_search_prints_the_best_that_fits_and_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("train.gradient_accumulation=2", "sharding.sync_bn_group_size=8")
    found = keep(tmp_path, "--recipe", "debug", *WHERE, "--search", *fixed)
    ranking = found["ranking"]
    speeds = [line["images_per_second"] for line in ranking]
    assert speeds == sorted(speeds, reverse=True)
    assert len(ranking) <= found["tried"]
    assert all(line["fits"] for line in ranking)
    assert {line["strategy"] for line in ranking} == {
        *("ddp", "fsdp", "hsdp", "zero0", "zero1", "zero2", "zero3")
    }
    assert {line["activation_checkpointing"] for line in ranking} == {"none", "full"}
    assert {line["sync_bn_group_size"] for line in ranking} == {8}
    assert found["command"] == ranking[0]["command"]
    assert capsys.readouterr().out.rstrip().endswith(found["command"])
    for line in ranking:
        config = accepted(line["command"], nodes=1, gpus=8)
        assert config.train.micro_batch_size == line["micro_batch_size"]
        assert config.train.gradient_accumulation == 2
        # The images stay those of the recipe's 8 steps, but for the last step's rest.
        assert 0 <= config.train.steps * line["global_batch"] - 8 * 64 < line["global_batch"]
    # A plan of the winner by itself is that plan.
    again = keep(
        tmp_path,
        *shlex.split(found["command"].replace("--deepspeed_config ", "sharding.deepspeed_config="))[
            shlex.split(found["command"]).index("launch/pretrain.py") + 1 :
        ],
        *WHERE,
    )
    assert again["images_per_second"] == pytest.approx(found["images_per_second"])


@pytest.mark.slow
def test_what_does_not_fit_says_by_how_much_and_what_would(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = keep(tmp_path, "--recipe", "seer_rg10b", *WHERE, "--strategy", "ddp")
    printed = capsys.readouterr().out
    assert found["fits"] is False  # and the status is 0, which `keep` asserts
    needed, has = found["memory_gib_per_rank"]["total"], found["memory_gib_available"]
    assert f"this plan does not fit: a rank takes {needed:.1f} GiB and has {has:.1f}\n" in printed
    assert f"does not fit, {needed - has:.1f} GiB too much" in printed
    # No way under ddp: another strategy.
    assert "nothing fits here: the least is" in printed
    assert re.search(r"fsdp with full recomputation fits (1 node|\d+ nodes) of this kind", printed)
    keep(tmp_path, "--recipe", "seer_256gf", *WHERE, "train.micro_batch_size=256",
         "sharding.sync_bn_group_size=8")  # fmt: skip
    printed = capsys.readouterr().out
    assert "what fits here, the fastest:" not in printed  # the micro-batch was named


def test_help_says_what_the_status_is() -> None:
    text = " ".join(command.parser().format_help().split())
    assert "`fits` in the JSON says it to scripts, and the exit status is 0" in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--recipe", "seer_257gf", *WHERE), "there is no recipe 'seer_257gf': did you mean"),
        (
            ("--recipe", "debug", "--hardware", "h100", "--nodes", "1", "--gpus-per-node", "8"),
            "there is no hardware 'h100': did you mean h100_80gb",
        ),
        (("--recipe", "debug", *WHERE, "--strategy", "zero4"), "there is no strategy 'zero4'"),
        (
            ("--recipe", "debug", *WHERE, "sharding.sync_bn_group_size=3"),
            "sharding.sync_bn_group_size is 3, which does not divide the 8 ranks",
        ),
        (
            ("--recipe", "seer_256gf", *WHERE),
            "sharding.sync_bn_group_size is 64, but the run has 8 ranks",
        ),
        (
            ("--recipe", "debug", *WHERE, "--strategy", "hsdp", "sharding.shard_size=3"),
            "sharding.shard_size is 3, but the run has 8 ranks",
        ),
        (
            ("--recipe", "debug", *WHERE, "train.micro_batches=3"),
            "train.micro_batches is not a key",
        ),
        (("--recipe", "debug", *WHERE, "--sarch"), "--sarch is not an option"),
        (("--recipe", "debug", *WHERE[:-1], "0"), "0 is not 1 or more"),
        (("--recipe", "debug"), "the following arguments are required: --hardware"),
        (
            (
                "--recipe",
                "debug",
                *WHERE,
                "sharding.deepspeed_config=ds_configs/zero2_offload.json",
            ),
            "the planner does not know offload",
        ),
        (
            ("--recipe", "debug", *WHERE, "sharding.strategy=fairscale"),
            "sharding.strategy is fairscale, which the planner does not know",
        ),
    ],
)
def test_bad_input_gets_a_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        command.main(arguments)
    assert str(caught.value).startswith(sentence) or sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_volta_and_bfloat16_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="use fp32 or amp-o1"):
        plan("debug", "v100_32gb", nodes=1, gpus_per_node=2, overrides=["train.precision=bf16"])


def test_the_command_line_answers_with_a_status() -> None:
    done = subprocess.run(
        [sys.executable, "launch/plan.py", "--recipe", "nothing", *WHERE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no recipe 'nothing'")
    assert "Traceback" not in done.stderr


def test_python_takes_a_resolved_configuration_too() -> None:
    named = plan("debug", "cpu", nodes=1, gpus_per_node=2, strategy="zero2")
    config = parse(["--recipe", "debug"], recipes=ROOT / "launch" / "recipes").config
    given = plan(config, "cpu", nodes=1, gpus_per_node=2, strategy="zero2")
    assert given.memory == named.memory
    assert given.to_dict() == named.to_dict()
