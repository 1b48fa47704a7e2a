"""`seer-scale data` on small collections."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from harness.jobs import ROOT, write_images
from harness.jobs import arguments as job
from seer_scale.commands import data
from seer_scale.commands.data import main
from seer_scale.config.recipe import parse
from seer_scale.data import build_loader, open_source
from seer_scale.data.augment import CropParameters
from seer_scale.data.inspection import describe, spread
from seer_scale.errors import ConfigError, DataError, UserError
from seer_scale.train.build_images import transform_of


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six images of different sizes, one of them truncated, another empty."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(4):
        (root / f"{number}.jpg").write_bytes(jpeg(300 + 100 * number, 240, number))
    (root / "cut.jpg").write_bytes(jpeg(300, 240)[:2000])
    (root / "empty.jpg").write_bytes(b"")
    return root


def test_inspect_counts_sizes_and_names_bad_files(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    assert main(["inspect", str(folder), "--out", str(out), "--count", "3"]) == 0
    text = capsys.readouterr().out
    assert "6 images, 6 of them checked: 4 good, 2 bad" in text
    assert re.search(r"^width +300 +450 +600$", text, re.M)
    assert re.search(r"^height +240 +240 +240$", text, re.M)
    assert re.search(r"^bytes +0 ", text, re.M)
    assert re.search(rf"^1 bad: zero bytes\n  {folder}/empty.jpg$", text, re.M)
    assert re.search(rf"^1 bad: (damaged|truncated)\n  {folder}/cut.jpg$", text, re.M)
    assert "crops of 2 x 160 and 4 x 96 pixels, colour distortion 1, of 3 images" in text
    assert f"not of a recipe), with their parameters: {out}" in text
    with Image.open(out) as sheet:
        assert sheet.width > 200 + 2 * 160 + 4 * 96
        assert sheet.height > 3 * 160


def test_the_crops_of_a_recipe_are_those_that_its_run_sees_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pixel by pixel, against the first micro-batch of the run's own loader."""
    keys = ["data.crop_sizes=[140,133]", "data.crop_counts=[1,2]", "run.seed=3"]
    keys += ["data.color_distortion=0.5", "data.crop_scales=[[0.3,1.0],[0.1,0.3]]"]
    for name in ("cut.jpg", "empty.jpg"):
        (folder / name).unlink()
    out = tmp_path / "sheet.png"
    words = ["inspect", str(folder), "--recipe", "demo", "--out", str(out), "--count", "2"]
    assert main([*words, *keys]) == 0
    said = capsys.readouterr().out
    assert (
        "crops of 1 x 140 and 2 x 133 pixels, colour distortion 0.5, of 2 images (the first" in said
    )
    assert "of a run of demo with run.seed=3" in said
    argv = ["--recipe", "demo", f"data.path={folder}", "data.workers=0", *keys]
    config = parse(argv, recipes=ROOT / "launch" / "recipes", ranks=1).config
    loader = build_loader(
        open_source(folder), transform_of(config), seed=3, micro_batch_size=2, workers=0
    )
    batch = next(iter(loader))
    with Image.open(out) as sheet:
        drawn = np.array(sheet)
    for row in range(2):
        crops = (batch.crops[0][row], batch.crops[1][row], batch.crops[1][2 + row])
        assert len({position(drawn, crop.numpy()) for crop in crops}) == 3


def position(drawn: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> tuple[int, int]:
    """The one place of a picture within another."""
    side = len(pixels)
    starts = np.argwhere((drawn == pixels[0, 0]).all(-1))
    inside = [(y, x) for y, x in starts.tolist() if y + side <= len(drawn)]
    (found,) = [
        (y, x)
        for y, x in inside
        if x + side <= drawn.shape[1] and (drawn[y : y + side, x : x + side] == pixels).all()
    ]
    return found


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["photos", "data.crop_sizes=[64]"], r"data.crop_sizes=\[64\] is a key of a recipe"),
        ([], "no images are named"),
        (["a", "b"], "two paths are given, a and b"),
        (["photos", "--recipe", "dem"], "did you mean demo"),
        (["photos", "--recipe", "demo", "data.crop_sizs=[64]"], "did you mean data.crop_sizes"),
    ],
)
def test_a_wrong_recipe_or_key_is_told(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        main(["inspect", *words])


def test_the_sheet_follows_from_the_seed(folder: Path, tmp_path: Path) -> None:
    sheets = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = tmp_path / name
        main(["inspect", str(folder), "--out", str(out), "--count", "2", "--seed", seed])
        sheets.append(out.read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_inspect_reads_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(5):
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(data := jpeg(64, 48, number))
            tar.addfile(member, io.BytesIO(data))
    arguments = ["--out", str(tmp_path / "sheet.png"), "--survey", "2"]
    assert main(["inspect", str(tmp_path / "0.tar"), *arguments]) == 0
    assert "5 images, 2 of them checked: 2 good, 0 bad" in capsys.readouterr().out


def test_a_collection_without_a_good_image_has_no_sheet(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="no image that can be decoded"):
        main(["inspect", str(tmp_path), "--out", str(tmp_path / "sheet.png")])
    assert not (tmp_path / "sheet.png").exists()


def test_a_sheet_that_cannot_be_written_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "launch/data.py", "inspect", str(folder)]
    command += ["--out", str(tmp_path / "missing" / "sheet.png")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(
        r"error: .*sheet.png cannot be written \(.*: name another file with --out\n", done.stderr
    )


def test_descriptions_hold_every_parameter() -> None:
    crop = CropParameters(96, (5, 6, 105, 86), True, (1.2, 0.4, 1.0, -0.1), (3, 0, 2, 1), True, 1.5)
    assert describe(crop) == [
        "100 x 80 at 5, 6",
        "B 1.20  C 0.40  S 1.00",
        "H -0.10  order HBSC",
        "flip, gray, blur 1.50",
    ]
    plain = CropParameters(96, (0, 0, 9, 9), False, None, (0, 1, 2, 3), False, 0.0)
    assert describe(plain)[1:] == ["no jitter", "no flip, gray or blur"]


@pytest.mark.parametrize(("total", "most"), [(10, 3), (3, 10), (1000, 7), (5, 5)])
def test_indices_are_spread_without_repetition(total: int, most: int) -> None:
    indices = spread(total, most)
    assert len(set(indices)) == len(indices) == min(total, most)
    assert min(indices) == 0
    assert max(indices) < total
    assert max(np.diff(indices), default=0) <= -(-total // most)


def test_bench_needs_a_jpeg(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"holds no JPEG that can be decoded: give a folder"):
        main(["bench", "--images", str(tmp_path)])


def test_without_a_clone_bench_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "SHIPPED", tmp_path)  # as in an installed wheel: no benchmarks/
    for arguments in (["bench"], ["bench", "--crops", "2x224+6x96"]):
        with pytest.raises(
            UserError, match=r"clone the repository and run `seer-scale data bench`"
        ):
            main(arguments)


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--seconds", "inf"], ["--json"]])
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", *wrong])
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.launch
@pytest.mark.long
def test_a_run_says_what_it_leaves_out_and_finds_home(tmp_path: Path) -> None:
    """Photographs with names in Latin-1, `~` in three keys, and two files that are not used."""
    home = tmp_path / "André"
    photos = os.fsencode(home) + b"/fotos"
    write_images(Path(os.fsdecode(photos)), 16)
    Path(os.fsdecode(photos + b"/class0/na\xefve.jpg")).write_bytes(b"<html>")
    Path(os.fsdecode(photos + b"/class0/\xe4.ppm")).write_bytes(b"P6")
    Path(os.fsdecode(photos + b"/class0/up")).symlink_to("..")
    write_images(home / "set", 8)
    (home / "set" / "class0").rename(os.fsdecode(os.fsencode(home) + b"/set/caf\xe9"))
    (home / "set" / "up").symlink_to(".")

    def run(run_dir: str, *more: str) -> tuple[int, str]:
        argv = job("~/fotos", run_dir, "train.steps=3", "data.workers=1", *more)
        done = subprocess.run(
            [sys.executable, "-m", "seer_scale", "pretrain", *argv],
            cwd=tmp_path,
            env={**os.environ, "HOME": str(home), "PYTHONPATH": str(ROOT)},
            capture_output=True,
            timeout=240,
            check=False,
        )
        return done.returncode, done.stderr.decode()

    evaluation = ("eval.every=3", "eval.data=~/set,~/set", "eval.size=32", "eval.images=4")
    status, said = run("~/run", *evaluation)
    assert status == 0, said
    assert "Traceback" not in said
    foreign = "images in formats that are not decoded"
    assert rf"data.path: left out: 1 {foreign} (class0/\xe4.ppm)" in said
    assert "data.path: left out: 1 folders that are listed already" in said
    assert "eval.data: 2 classes; 8 images to train, 8 to test" in said
    run_dir = home / "run"
    assert any(path.name.startswith("step_") for path in (run_dir / "checkpoints").iterdir())
    assert not (tmp_path / "~").exists()
    for file in ("metrics.jsonl", "config.yaml"):
        (run_dir / file).read_text(encoding="utf-8")
    assert r"na\\xefve.jpg" in (run_dir / "bad_samples.jsonl").read_text()

    # safetensors, for one, opens no file in a folder with such a name.
    status, said = run(os.fsdecode(b"~/r\xfcn"))
    assert status == 2
    assert said.startswith("error: run.dir is ")
    assert "but must be UTF-8: rename the file or folder, or make a link to it" in said
