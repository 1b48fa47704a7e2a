"""`seer-scale register` against a real registry: foreign weights, twice, and without a server."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import seer_scale
from seer_scale.commands.register import main
from seer_scale.distributed.ports import free_port
from seer_scale.errors import UserError
from seer_scale.models import build_trunk, initialise
from seer_scale.serving import export_trunk
from seer_scale.tracking.quiet import quieten

IMAGES = torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32)


def export(folder: Path, seed: int) -> Path:
    trunk = build_trunk("regnety_debug", device="cpu")
    initialise(trunk, seed)
    return export_trunk(trunk.eval(), folder, trunk="regnety_debug")


def test_weights_become_versions_and_the_same_ones_stay_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    quieten()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    first, second = export(tmp_path / "first", 1), export(tmp_path / "second", 2)

    def register(source: Path | str, *more: str) -> str:
        assert main([str(source), "--name", "tried", "--uri", uri, *more]) == 0
        return capsys.readouterr().out

    assert "is version 1 of tried" in register(first, "--alias", "good")
    assert "is version 2 of tried" in register(second)
    assert "is version 1 of tried" in register(first)
    # What is not in our format is registered in it.
    from seer_scale.convert import convert

    convert(second, "huggingface", tmp_path / "foreign")
    assert "tried" in register(tmp_path / "foreign", "--alias", "foreign")
    for alias, source in (("good", first), ("foreign", second)):
        registered = seer_scale.load(f"models:/tried@{alias}", tracking_uri=uri)
        assert torch.equal(registered(IMAGES), seer_scale.load(source)(IMAGES)), alias


def test_no_server_and_no_weights_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    address = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match=rf"{address} does not answer"):
        main([str(export(tmp_path / "trunk", 0)), "--name", "x", "--uri", address])
    with pytest.raises(UserError, match="absent is neither a folder nor a file"):
        main(["absent", "--name", "x", "--uri", f"sqlite:///{tmp_path}/mlflow.db"])
