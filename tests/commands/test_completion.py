"""Completion scripts: the shells take them, and bash offers commands and options from them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from seer_scale.commands.completion import main
from seer_scale.commands.run import COMMANDS


def script(shell: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert main([shell]) == 0
    path = folder / f"completion.{shell}"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_its_options_are_in_it(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script(shell, tmp_path, capsys)
    text = path.read_text()
    assert all(name in text for name in COMMANDS)
    assert all(option in text for option in ("gpus-per-node", "deepspeed_config", "keep-every"))
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: the script is written, but no shell has read it")
    subprocess.run([shell, "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["seer-scale", "do"], {"doctor"}),
        (["seer-scale", "checkpoint", "in"], {"inspect"}),
        (["seer-scale", "doctor", "--q"], {"--quick"}),
        (["seer-scale", "convert", "x", "--to", "t"], {"timm", "torchvision"}),
    ],
)
def test_bash_completes(
    words: list[str], offered: set[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = script("bash", tmp_path, capsys)
    typed = " ".join(words)
    code = (
        f"source {path}; COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; "
        f"COMP_LINE='{typed}'; COMP_POINT={len(typed)}; COMPREPLY=(); "
        '"$(complete -p seer-scale | sed -E "s/.*-F ([^ ]+).*/\\1/")" seer-scale; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == offered
