"""`launch/convert.py` as it is typed: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import seer_scale
from seer_scale.commands.convert import main
from seer_scale.serving import export_trunk
from seer_scale.tracking.records import keep_knn
from tests.convert.weights import assert_same_bits, random_trunk, write_source

ROOT = Path(__file__).resolve().parents[2]
TRUNK = "regnety_200mf"


@pytest.mark.parametrize("to", ["timm", "huggingface"])
def test_a_folder_holds_weights_config_and_card(
    to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = write_source(TRUNK, tmp_path / "source.safetensors")
    out = tmp_path / "exports" / to
    assert main([str(tmp_path / "source.safetensors"), "--to", to, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"is {TRUNK} under torchvision's names: {len(state)} tensors" in printed
    lines = printed.split(f"wrote {out}; what loads it:\n")[1]
    assert str(out) in lines
    found: dict[str, object] = {}
    exec(textwrap.dedent(lines), found)  # as a user copies them
    assert found["model"] is not None
    assert len(load_file(out / "model.safetensors")) == len(state)
    assert json.loads((out / "config.json").read_text())
    card = (out / "README.md").read_text()
    for text in (f"`{TRUNK}`", "2,793,996", "0.485, 0.456, 0.406", "RGB", "non-commercial"):
        assert text in card
    assert_same_bits(dict(seer_scale.load(out).state_dict()), state)


def test_from_a_run_to_every_format(tmp_path: Path) -> None:
    state = random_trunk(TRUNK).state_dict()
    step = tmp_path / "run" / "checkpoints" / "step_00000010"
    export_trunk(state, step / "trunk", trunk=TRUNK, step=10)
    for to, name in (
        ("vissl", "trunk.torch"),
        ("torchvision", "trunk.pth"),
        ("torchvision", "trunk.safetensors"),
        ("safetensors", "own"),
        ("safetensors", "own.safetensors"),
    ):
        out = tmp_path / to / name
        main([str(tmp_path / "run"), "--trunk", TRUNK, "--to", to, "--out", str(out)])
        assert_same_bits(dict(seer_scale.load(out).state_dict()), state)
    assert torch.load(tmp_path / "torchvision" / "trunk.pth", weights_only=True).keys() == (
        state.keys()
    )
    own = tmp_path / "own_dir"
    main([str(step), "--to", "safetensors", "--out", str(own)])
    assert (own / "trunk.safetensors").is_file()


def test_a_card_speaks_of_the_run_that_made_the_trunk(tmp_path: Path) -> None:
    """And so does the card of what was converted from the converted one, and a registered model."""
    step = tmp_path / "run" / "checkpoints" / "step_00000010"
    made = {"recipe": "mine", "objective": "swav", "steps": 10, "images": 20480}
    made |= {"crop_sizes": [96, 48], "crop_counts": [2, 4]}
    export_trunk(random_trunk(TRUNK), step / "trunk", trunk=TRUNK, step=10, pretraining=made)
    lines = [{"step": 10, "loss": 1.0}, {"step": 10, "eval/knn_top1": 0.25}]
    records = tmp_path / "run" / "metrics.jsonl"
    records.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    main([str(tmp_path / "run"), "--to", "timm", "--out", str(tmp_path / "timm")])
    card = (tmp_path / "timm" / "README.md").read_text()
    for row in ("recipe | `mine`", "steps | 10", "images seen | 20,480", "k-NN top-1 | 25.00 %"):
        assert f"| {row} |" in card
    assert "2 x 96 pixels and 4 x 48 pixels" in card
    for text in ("Meta", "non-commercial", "224 pixels"):
        assert text not in card
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 96]
    # `evaluate knn` leaves its result in the run; it says more than the one of the training.
    keep_knn(tmp_path / "run", 10, {"top1": 0.5, "data": "labelled", "size": 96})
    main([str(step), "--to", "safetensors", "--out", str(tmp_path / "own")])
    main([str(tmp_path / "own"), "--to", "vissl", "--out", str(tmp_path / "v" / "a.torch")])
    for folder in ("own", "v"):
        card = (tmp_path / folder / "README.md").read_text()
        assert "| k-NN top-1 | 50.00 % on `labelled` at 96 pixels |" in card


def test_a_card_does_not_replace_anothers(tmp_path: Path) -> None:
    write_source(TRUNK, tmp_path / "source.safetensors")
    (tmp_path / "README.md").write_text("mine")
    for _ in range(2):
        main([str(tmp_path / "source.safetensors"), "--to", "vissl",
              "--out", str(tmp_path / "a.torch")])  # fmt: skip
    assert (tmp_path / "README.md").read_text() == "mine"
    assert "# a.torch" in (tmp_path / "a.torch.README.md").read_text()


def test_a_mistake_is_one_sentence_and_status_1(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launch/convert.py", str(tmp_path), "--to", "timm", "--out", "x"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "holds no trunk" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
