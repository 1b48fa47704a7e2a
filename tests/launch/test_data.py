"""launch/data.py on small collections."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.jobs import ROOT
from seer_scale.commands.data import main
from seer_scale.data import bench
from seer_scale.data.augment import CropParameters
from seer_scale.data.contact_sheet import describe, spread
from seer_scale.errors import DataError


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
    assert "6 images, 6 of them decoded: 4 good" in text
    assert re.search(r"^width +300 +450 +600$", text, re.M)
    assert re.search(r"^height +240 +240 +240$", text, re.M)
    assert re.search(r"^bytes +0 ", text, re.M)
    assert re.search(rf"^1 bad: zero bytes\n  {folder}/empty.jpg$", text, re.M)
    assert re.search(rf"^1 bad: (damaged|truncated)\n  {folder}/cut.jpg$", text, re.M)
    assert f"crops of 3 images with their parameters: {out}" in text
    sheet = Image.open(out)
    assert sheet.width > 200 + 2 * 160 + 4 * 96
    assert sheet.height > 3 * 160


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
    assert "5 images, 2 of them decoded: 2 good" in capsys.readouterr().out


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
    assert re.fullmatch(r"error: --out .*sheet.png cannot be written \(.*\n", done.stderr)


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


def test_bench_writes_a_row_per_pipeline(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bench, "LOADER_TURNS", 1)  # starting workers takes seconds
    out = tmp_path / "bench.json"
    assert main(["bench", "--images", str(folder), "--seconds", "0.01", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())
    assert {row["images"] for row in rows} == {"photos"}
    expected = [name for name in bench.PIPELINES if name != "lightly"]
    assert [row["pipeline"] for row in rows if row["pipeline"] != "lightly"] == expected
    assert all(row["images_per_second"] > 0 for row in rows)
    text = capsys.readouterr().out
    assert "photos: 4 JPEGs of" in text  # neither the truncated nor the empty one
    assert re.search(r"^photos +pil +\d+\.\d +1\.00 +\d+%$", text, re.M)
    assert re.search(r"^photos +dataloader_pil +\d+\.\d +1\.00 +\d+%$", text, re.M)


def test_bench_needs_a_jpeg(tmp_path: Path) -> None:
    (tmp_path / "page.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"holds no JPEG that can be decoded: give a folder"):
        main(["bench", "--images", str(tmp_path)])


def test_photographs_have_the_size_asked_for() -> None:
    (images,) = bench.photograph_sets([(120, 90)])
    assert images.name == "120x90"
    assert len(images.files) == 8
    sizes = {Image.open(io.BytesIO(data)).size for data in images.files}
    assert sizes == {(120, 90)}


@pytest.mark.parametrize("wrong", [["--seconds", "0"], ["--seconds", "inf"], ["--json"]])
def test_wrong_arguments_are_refused(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["bench", *wrong])
    assert left.value.code == 2
    assert "usage" in capsys.readouterr().err
