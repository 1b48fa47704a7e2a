"""Completion scripts: the shells take them, and bash offers commands and options from them."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from harness.jobs import ROOT
from seer_scale.commands.completion import main
from seer_scale.commands.run import COMMANDS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The script of each shell."""
    folder = tmp_path_factory.mktemp("scripts")
    found = {}
    for shell in ("bash", "zsh", "fish"):
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            assert main([shell]) == 0
        found[shell] = folder / f"completion.{shell}"
        found[shell].write_text(said.getvalue())
    return found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_its_options_are_in_it(shell: str, scripts: dict[str, Path]) -> None:
    text = scripts[shell].read_text()
    assert all(name in text for name in COMMANDS)
    assert all(option in text for option in ("gpus-per-node", "deepspeed_config", "keep-every"))
    assert all(word in text for word in ("seer_rg10b", "h100_80gb", "optim.base_lr=", "rg_10b"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: the script is written, but no shell has read it")
    subprocess.run([shell, "-n", str(scripts[shell])], check=True)


RECIPES = {path.stem for path in (ROOT / "launch" / "recipes").glob("*.yaml")}
PROFILES = {path.stem for path in (ROOT / "seer_scale").rglob("h*_*gb.yaml")}


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["seer-scale", "do"], {"doctor"}),
        (["seer-scale", "checkpoint", "in"], {"inspect"}),
        (["seer-scale", "checkpoint", "li"], {"list"}),
        (["seer-scale", "doctor", "--q"], {"--quick"}),
        (["seer-scale", "convert", "x", "--to", "t"], {"timm", "torchvision"}),
        (["seer-scale", "convert", "--trunk", "regnety_12"], {"regnety_128gf"}),
        (["seer-scale", "pretrain", "--recipe", "seer_"], {r for r in RECIPES if "seer_" in r}),
        (["seer-scale", "plan", "--hardware", "h"], PROFILES),
        (["seer-scale", "plan", "--recipe", "dem"], {"demo"}),
        (["seer-scale", "doctor", "--run", "dem"], {"demo"}),
        (["seer-scale", "data", "inspect", "--recipe", "dem"], {"demo"}),
        (
            ["seer-scale", "data", "inspect", "--recipe", "demo", "data.crop_si"],
            {"data.crop_sizes="},
        ),
        (["seer-scale", "evaluate", "kn"], {"knn"}),
        (["seer-scale", "evaluate", "knn", "temp"], {"temperature="}),
        (["seer-scale", "pretrain", "--recipe", "demo", "optim.base_l"], {"optim.base_lr="}),
        (["seer-scale", "plan", "train.precis"], {"train.precision="}),
        # Bash cuts the word at the equals sign.
        (["seer-scale", "pretrain", "model.trunk", "=", "regnety_12"], {"regnety_128gf"}),
        (["seer-scale", "pretrain", "train.compile", "="], {"true", "false"}),
        (["seer-scale", "pretrain", "x", "objective.name", "=", "s"], {"swav", "simclr"}),
    ],
)
def test_bash_completes(words: list[str], offered: set[str], scripts: dict[str, Path]) -> None:
    assert offered
    typed = " ".join(words)
    code = (
        f"cd /; source {scripts['bash']}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
        f"COMP_LINE='{typed}'; COMP_POINT={len(typed)}; COMPREPLY=(); "
        '"$(complete -p seer-scale | sed -E "s/.*-F ([^ ]+).*/\\1/")" seer-scale; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered


@pytest.mark.skipif(shutil.which("fish") is None, reason="fish is not installed")
@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("seer-scale pretrain --recipe dem", {"demo"}),
        ("seer-scale pretrain model.trunk=regnety_12", {"model.trunk=regnety_128gf"}),
        ("seer-scale evaluate kn", {"knn"}),
    ],
)
def test_fish_completes(typed: str, offered: set[str], scripts: dict[str, Path]) -> None:
    code = f"source {scripts['fish']}; complete -C '{typed}'"
    done = subprocess.run(["fish", "-c", code], capture_output=True, text=True, check=True)
    assert {line.split("\t")[0] for line in done.stdout.splitlines()} == offered
