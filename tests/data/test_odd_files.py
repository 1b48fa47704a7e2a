"""Decoding, folders, tars, evaluation and `data inspect` are held to one truth about odd files."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.jobs import ROOT
from seer_scale.commands.data import main
from seer_scale.data import Source, open_source
from seer_scale.data.augment import CropParameters, MultiCrop
from seer_scale.data.crops import cut_crops
from seer_scale.data.decode import BadImage, decode
from seer_scale.data.middle_crop import MiddleCrop
from seer_scale.data.order import sample_rng
from seer_scale.errors import DataError
from seer_scale.evaluation.datasets.labelled import LabelledImages
from seer_scale.evaluation.labelled_crops import crop_batches
from tests.data.odd_files import ONLY_CROPS, OddFile, make_odd_files, write_folder, write_tar


@pytest.fixture(scope="module")
def files() -> list[OddFile]:
    return list(make_odd_files(np.random.default_rng(0)))


@pytest.fixture(scope="module", params=["folder", "tar"])
def source(
    request: pytest.FixtureRequest, files: list[OddFile], tmp_path_factory: pytest.TempPathFactory
) -> Source:
    root = tmp_path_factory.mktemp("odd")
    if request.param == "folder":
        write_folder(root / "files", files)
        return open_source(root / "files")
    write_tar(root / "files.tar", files)
    return open_source(root / "files.tar")


def used(files: list[OddFile]) -> list[OddFile]:
    return sorted((file for file in files if file.left_out is None), key=lambda file: file.name)


def numbered(source: Source) -> dict[bytes, int]:
    """Index by the number that every name begins with."""
    names = (os.path.basename(source.name(index)) for index in range(len(source)))
    return {name[:3].encode(): index for index, name in enumerate(names)}


def draw(width: int, height: int) -> list[CropParameters]:
    return MultiCrop((32, 16), (2, 3)).draw(sample_rng(0, 0), width, height)


def outcome(read: Callable[..., object], *arguments: object) -> str | None:
    """The cause of a bad image, or None."""
    try:
        read(*arguments)
    except BadImage as error:
        return error.cause
    return None


def test_a_file_decodes_to_its_picture_or_has_its_cause(files: list[OddFile]) -> None:
    expected = {file.name: file.cause for file in used(files)}
    found = {file.name: outcome(cut_crops, file.data, draw) for file in used(files)}
    assert found == expected
    by_pillow = {n: cause for n, cause in expected.items() if ONLY_CROPS not in n}
    found = {file.name: outcome(decode, file.data) for file in used(files)}
    assert {name: found[name] for name in by_pillow} == by_pillow
    assert {file.name: off for file in used(files) if (off := wrong(file)) is not None} == {}


def wrong(file: OddFile) -> str | None:
    """What is wrong with the picture of a good file, if anything."""
    if file.pixels is None:
        return None
    image = decode(file.data)
    if image.size != file.pixels.size:
        return f"{image.size} instead of {file.pixels.size}"
    rows = (0, 0, image.width, min(image.height, 100_000))  # numbers of a thin one would take 1 GB
    seen, truth = (np.asarray(picture.crop(rows), float) for picture in (image, file.pixels))
    off = np.abs(seen - truth).mean()
    return None if off <= file.loss else f"off by {off}"


def test_a_collection_uses_or_names_every_file(source: Source, files: list[OddFile]) -> None:
    places = numbered(source)
    assert len(places) == len(source)
    assert sorted(places) == [file.name[:3] for file in used(files)]
    for file in used(files):
        assert source.read(places[file.name[:3]]) == file.data, file.name
    expected = Counter(file.left_out for file in files if file.left_out is not None)
    found = {reason: count for reason, (count, _) in source.left_out.reasons.items()}
    assert found == expected


def test_names_are_fit_to_print(source: Source) -> None:
    names = [os.path.basename(source.name(index)) for index in range(len(source))]
    for name in names:
        name.encode()
        assert len(name.splitlines()) == 1
        assert "\x1b" not in name
    assert sum(name.endswith(r" caf\xe9.png") for name in names) == 1
    assert sum(name.endswith(" nihongo 日本語.png") for name in names) == 1


def test_an_evaluation_sees_the_pictures_and_names_the_bad_ones(
    source: Source, files: list[OddFile]
) -> None:
    images, places = LabelledImages.whole(source), numbered(source)
    crop = MiddleCrop(32)
    for file in used(files):
        batches = crop_batches(images, [[(places[file.name[:3]], 0)]], crop, workers=1)
        if file.cause is None:
            assert file.pixels is not None
            seen = next(batches)[0][0]
            assert (seen - crop.cut(file.pixels)).abs().mean() <= 0.02 * file.loss, file.name
        elif ONLY_CROPS not in file.name:
            with pytest.raises(DataError, match=re.escape(f"cannot be used ({file.cause})")):
                next(batches)


def test_inspect_counts_the_same(
    source: Source, files: list[OddFile], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = source.name(0).rpartition("/")[0]
    assert main(["inspect", path, "--survey", "0", "--out", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out
    good = sum(file.cause is None for file in used(files))
    assert f"{len(used(files))} images, {len(used(files))} of them checked: {good} good" in said
    for cause, count in Counter(file.cause for file in used(files) if file.cause).items():
        assert f"\n{count} bad: {cause}\n" in said
    for reason, count in Counter(file.left_out for file in files if file.left_out).items():
        assert f"\nleft out: {count} {reason} (" in said


@pytest.mark.parametrize("size", [(1, 20_000_000), (1, 60_000), (60_000, 1), (3, 50_000)])
@pytest.mark.parametrize("bicubic", [False, True])
def test_a_thin_picture_takes_no_memory(size: tuple[int, int], bicubic: bool) -> None:
    """The largest comes first: resized whole, it is refused, and the others take the memory.

    The oracle resizes only what lies in the middle, with room for the filter.
    """
    rng, (width, height) = np.random.default_rng(0), size
    pixels = np.broadcast_to(np.uint8(90), (height, width, 3)).copy()
    middle = tuple(
        slice(side // 2 - 16, side // 2 + 16) if side > 32 else slice(None)
        for side in (height, width)
    )
    pixels[middle] = rng.integers(0, 256, pixels[middle].shape)
    image = Image.fromarray(pixels)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    crop = MiddleCrop(224, bicubic=bicubic).cut(image)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    short = min(size)
    off_x, off_y = (max(0, side // 2 - 16 * short) for side in size)
    part = image.crop((off_x, off_y, width - off_x, height - off_y))
    scale = 256 / short
    way = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
    resized = part.resize((round(part.width * scale), round(part.height * scale)), way)
    left, top = (resized.width - 224) // 2, (resized.height - 224) // 2
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224)), float)
    spread = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    found = 255 * (crop * spread + torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1))
    # The two resized images may differ by half a pixel of 256.
    assert np.abs(found.permute(1, 2, 0).numpy() - expected).mean() < 1.0


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """A command with output to a pipe, as a batch system's."""
    return subprocess.run(
        [sys.executable, "-m", "seer_scale", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        timeout=300,
        check=False,
    )


@pytest.mark.launch
@pytest.mark.long
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_names_of_any_bytes_pass_through_commands(tmp_path: Path, encoding: str) -> None:
    """Names of a folder, a class and a file; terminals that know all characters, or few."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/fotos \xfc"))
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in (b"caf\xe9", "日本 $\\frac$".encode(), b"plain"):
            folder = Path(os.fsdecode(os.fsencode(root / part) + b"/" + name))
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                path = os.fsencode(folder) + b"/na\xefve %d.png" % number
                Image.fromarray(pixels).save(os.fsdecode(path))
    Path(os.fsdecode(os.fsencode(root / "train") + b"/plain/b\xe4d.jpg")).write_bytes(b"<html>")
    sheet = str(tmp_path / "sheet.png")
    words = ["data", "inspect", str(root / "train"), "--out", sheet]
    done = run(*words, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"b\xe4d.jpg" in done.stdout
    done = run("data", "index", str(root), PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, b"")

    out = ["--out", str(tmp_path / "out"), "--features", str(tmp_path / "features")]
    words = ["evaluate", "knn", "--model", "random:regnety_debug", "--data", str(root), *out]
    words += ["--mlflow-uri", "none", "size=32", "k=3"]
    done = run(*words, PYTHONIOENCODING=encoding)
    assert done.returncode == 1
    assert rb"b\xe4d.jpg cannot be used (not an image)" in done.stderr
    os.unlink(os.fsencode(root / "train") + b"/plain/b\xe4d.jpg")
    done = run(*words, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"3 classes; 12 images to train, 12 to test" in done.stderr
    assert b"Traceback" not in done.stderr
    assert rb"caf\\xe9" in (tmp_path / "out" / "knn.json").read_bytes()
    shutil.rmtree(root)
