"""launch/plan.py as users call it: figures, JSON, a search whose command starts, clear refusals."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from seer_scale.commands import plan as command
from seer_scale.config.ds_config import ds_config_of
from seer_scale.config.recipe import parse
from seer_scale.errors import ConfigError
from seer_scale.performance.hardware import names
from seer_scale.planner import plan
from seer_scale.planner.text import duration, money, rounded
from seer_scale.train.build_engine import check_run
from tests.planner.test_memory import NO_ACTIVATIONS

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
    assert (room := re.search(r"fits, ([\d.]+) GiB to spare", printed))
    assert float(room[1]) > 0
    assert "torchrun --nnodes 1 --nproc_per_node 8 launch/pretrain.py --recipe debug" in printed


def accepted(line: str, *, nodes: int, gpus: int) -> Any:
    """The configuration that a printed command gives, checked as launch/pretrain.py checks it."""
    words = shlex.split(line)
    argv = words[words.index("launch/pretrain.py") + 1 :]
    config = parse(argv, recipes=ROOT / "launch" / "recipes", ranks=nodes * gpus).config
    zero = ds_config_of(config, nodes * gpus)
    check_run(config, zero, world_size=nodes * gpus, local_world_size=gpus, cuda=True)
    return config


def planned(*arguments: str, nodes: int, gpus: int, **options: Any) -> dict[str, Any]:
    """A plan of `seer_256gf` or another recipe, without its activations, as JSON."""
    recipe, *overrides = arguments
    where: dict[str, Any] = {"nodes": nodes, "gpus_per_node": gpus, "overrides": overrides}
    return plan(recipe, "h100_80gb", profile=NO_ACTIVATIONS, **where, **options).to_dict()


def dry_run(command: list[str], **environment: str) -> dict[str, Any]:
    """The configuration that a command prints under `--dry-run`, by section."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        [*command, "--dry-run"],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(yaml.safe_load(done.stdout))


def trains(found: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a configuration has the numbers of a plan."""
    names = ("images", "global_batch", "steps", "micro_batch_size", "gradient_accumulation")
    return {name: config["train"][name] for name in names} == {name: found[name] for name in names}


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "nodes", "options", "steps"),
    [
        (("seer_256gf",), 8, {}, 122_070),
        (("seer_rg10b", "train.global_batch=4096"), 1, {"strategy": "zero3"}, 244_140),
        (("seer_128gf",), 2, {"strategy": "fsdp", "images": 10**8}, 24_414),
        (("swav_in1k_regnety_16gf", "train.steps=100", "train.micro_batch_size=8"), 8, {}, 100),
    ],
)
def test_the_printed_command_trains_what_was_planned(
    arguments: tuple[str, ...], nodes: int, options: dict[str, Any], steps: int
) -> None:
    """As a rank of the launcher runs it."""
    found = planned(*arguments, nodes=nodes, gpus=8, **options)
    assert found["steps"] == steps
    words = shlex.split(found["command"])
    script = words.index("launch/pretrain.py")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(8 * nodes), "LOCAL_WORLD_SIZE": "8"}
    config = dry_run([sys.executable, *words[script:]], **rank)
    assert trains(found, config)
    assert config["sharding"]["sync_bn_group_size"] == found["sync_bn_group_size"]


@pytest.mark.long
@pytest.mark.launch
def test_the_printed_command_starts_as_it_is() -> None:
    found = planned("demo", nodes=1, gpus=2, strategy="ddp")
    assert trains(found, dry_run(shlex.split(found["command"])))
    assert (found["micro_batch_size"], found["global_batch"], found["steps"]) == (32, 64, 320)


def test_a_price_is_shown_as_money_and_a_plan_that_does_not_fit_says_so_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    big = ("--recipe", "debug", *WHERE, "train.micro_batch_size=65536", "train.steps=10")
    found = keep(tmp_path, *big, "--price-per-gpu-hour", "2.5", "--strategy", "ddp")
    printed = capsys.readouterr().out
    assert found["fits"] is False
    assert found["price"] == pytest.approx(2.5 * found["gpu_hours"])
    assert f", {money(found['price'])} at $2.50 an hour" in printed
    assert "does not fit" in printed.splitlines()[0]
    assert found["command"] not in printed  # it would only run out of memory


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("0", "0 is not a price above 0"), ("inf", "inf is not a price"), ("x", "invalid price")],
)
def test_what_is_no_price_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        command.main(["--recipe", "debug", *WHERE, "--price-per-gpu-hour", text])


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.012345, "0.0123"),
        (9.876, "9.88"),
        (99.96, "100"),
        (19_653.2, "19,700"),
        (1e6, "1,000,000"),
    ],
)
def test_figures_have_three_digits(number: float, text: str) -> None:
    assert rounded(number) == text


@pytest.mark.parametrize(
    ("days", "text"),
    [
        (1e-7, "less than a second"),
        (0.0001, "8.64 seconds"),
        (0.001, "1.44 minutes"),
        (0.5, "12 hours"),
        (9.384, "9.38 days"),
        (4321.0, "4,320 days"),
    ],
)
def test_a_time_has_the_unit_that_suits_it(days: float, text: str) -> None:
    assert duration(days) == text


@pytest.mark.parametrize(
    ("dollars", "text"),
    [(0.0001, "less than $0.01"), (1.5, "$1.50"), (163_412.0, "$163,000")],
)
def test_a_price_is_written_in_cents_or_with_three_digits(dollars: float, text: str) -> None:
    assert money(dollars) == text


def test_help_names_the_profiles() -> None:
    text = command.parser().format_help()
    assert all(name in text for name in names())
    assert "l40s_48gb" in text


def test_images_are_written_as_people_write_them(tmp_path: Path) -> None:
    found = keep(tmp_path, "--recipe", "debug", *WHERE, "--images", "1e6")
    assert (found["images"], found["steps"]) == (10**6, 10**6 // 32)
    assert found["command"].endswith("--recipe debug train.images=1000000")
    with pytest.raises(ConfigError, match=r"'1\.5' is not a number of images"):
        keep(tmp_path, "--recipe", "debug", *WHERE, "--images", "1.5")


@pytest.mark.long
def test_a_search_prints_the_best_that_fits_and_it_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ("sharding.sync_bn_group_size=8",)
    priced = ("--search", "--price-per-gpu-hour", "2.5")
    found = keep(tmp_path, "--recipe", "debug", *WHERE, *priced, *fixed)
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
    printed = capsys.readouterr().out
    assert printed.rstrip().endswith(found["command"])
    assert money(found["price"]) in printed
    for line in ranking:
        config = accepted(line["command"], nodes=1, gpus=8)
        assert config.train.micro_batch_size == line["micro_batch_size"]
        assert config.train.gradient_accumulation == line["gradient_accumulation"]
        # Every one of them trains the recipe: 8 steps of 4 images on 8 ranks.
        assert (
            (config.train.steps, config.train.global_batch) == (8, 32) == (8, line["global_batch"])
        )
    assert {line["micro_batch_size"] for line in ranking} == {1, 2, 4}
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
    assert f"this plan does not fit: a rank needs {needed:.1f} GiB and has {has:.1f}\n" in printed
    assert f"does not fit, {needed - has:.1f} GiB too much" in printed
    # No way under ddp: another strategy.
    assert "nothing fits here: the least is" in printed
    assert re.search(r"fsdp with full recomputation fits (1 node|\d+ nodes) of this kind", printed)
    keep(tmp_path, "--recipe", "seer_256gf", *WHERE, "train.micro_batch_size=256",
         "sharding.sync_bn_group_size=8")  # fmt: skip
    printed = capsys.readouterr().out
    assert "the fastest configuration that fits:" not in printed  # the micro-batch was named


def test_help_says_what_the_status_is() -> None:
    text = " ".join(command.parser().format_help().split())
    assert "Scripts read `fits` in the JSON; the exit status is 0" in text


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
            "which does not divide the 8 ranks: the last group would be smaller than the others; "
            "set it to 1, 2, 4 or 8, to 0 for all ranks or to -1",
        ),
        (
            ("--recipe", "seer_256gf", *WHERE, "sharding.sync_bn_group_size=64"),
            "sharding.sync_bn_group_size is 64, but the run has 8 ranks: set it to 1, 2, 4 or 8, 0",
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
        (("--recipe", "debug"), ", for example --recipe demo --hardware rtx_4090_24gb --nodes 1 "),
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
    config = parse(["--recipe", "debug"], recipes=ROOT / "launch" / "recipes", ranks=2).config
    given = plan(config, "cpu", nodes=1, gpus_per_node=2, strategy="zero2")
    assert given.memory == named.memory
    assert given.to_dict() == named.to_dict()
