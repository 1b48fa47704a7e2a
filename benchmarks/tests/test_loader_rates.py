"""`seer-scale data bench`: a row for each pipeline, and the photographs that are measured."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import loader_rates as bench
from seer_scale.commands.data import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images of different sizes; a truncated and an empty one beside them."""
    root = tmp_path / "photos"
    root.mkdir()
    for number in range(4):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 8, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((300 + 100 * number, 240), Image.Resampling.BICUBIC)
        image.save(root / f"{number}.jpg", quality=90)
    (root / "cut.jpg").write_bytes((root / "0.jpg").read_bytes()[:2000])
    (root / "empty.jpg").write_bytes(b"")
    return root


@pytest.mark.long
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


def test_photographs_have_the_size_asked_for() -> None:
    (images,) = bench.photograph_sets([(120, 90)])
    assert images.name == "120x90"
    assert len(images.files) == 8
    sizes = {Image.open(io.BytesIO(data)).size for data in images.files}
    assert sizes == {(120, 90)}
