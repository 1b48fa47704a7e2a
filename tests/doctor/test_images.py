"""A few images of a collection, read as a run reads them: folders, shards and a dead file."""

from __future__ import annotations

import os
import tarfile
import time
from functools import partial
from pathlib import Path

import pytest

from harness.jobs import write_images
from seer_scale.data import Source, open_source
from seer_scale.doctor import Finding
from seer_scale.doctor.images import check_images


def check(path: Path, seconds: float = 60.0) -> tuple[Finding, Source | None]:
    return check_images("data.path", partial(open_source, str(path)), seconds)


def test_a_folder_s_first_and_last_image_are_read(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images")
    found, source = check(folder)
    assert found.status == "ok", found
    assert found.value.startswith("24 images in 1 shards")
    assert source is not None
    for index in (0, 23):  # in the order of the source
        broken = Path(source.name(index))
        good = broken.read_bytes()
        broken.write_bytes(b"no image")
        found, _ = check(folder)
        assert found.status == "fail"
        assert f"{broken} (not an image)" in found.value
        broken.write_bytes(good)


def test_each_shard_may_be_the_random_one(tmp_path: Path) -> None:
    """Only the middle shard is broken: one in three looks must find it."""
    images = sorted(write_images(tmp_path / "images", 9).rglob("*.jpg"))
    (tmp_path / "shards").mkdir()
    for number in range(3):
        with tarfile.open(tmp_path / "shards" / f"{number}.tar", "w") as tar:
            for image in images[3 * number : 3 * number + 3]:
                if number == 1:
                    image.write_bytes(b"no image")
                tar.add(image, image.name)
    looks = [check(tmp_path / "shards")[0] for _ in range(60)]
    # (2/3)**60 is 3e-11.
    assert {one.status for one in looks} == {"ok", "fail"}
    assert all("1.tar/" in one.value for one in looks if one.status == "fail")


def test_a_path_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    found, source = check(tmp_path / "none")
    assert (found.status, source) == ("fail", None)
    assert "does not exist" in found.meaning


@pytest.mark.timeout(120)
def test_what_never_answers_is_left_behind(tmp_path: Path) -> None:
    """A pipe that nobody writes to, as a dead mount behaves; it is opened by hand here."""
    os.mkfifo(tmp_path / "pipe")

    def opening() -> Source:
        (tmp_path / "pipe").read_bytes()
        return open_source(tmp_path)

    began = time.monotonic()
    found, source = check_images("data.path", opening, 0.5)
    assert time.monotonic() - began < 60
    assert (found.status, source) == ("fail", None)
    assert "0.5 s" in found.value
    (tmp_path / "pipe").write_bytes(b"")  # lets the thread end


def test_an_error_of_the_program_is_no_finding() -> None:
    def opening() -> Source:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        check_images("data.path", opening, 60.0)
