"""A folder tree lists every image once, in an order of its own, and names what it leaves out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from seer_scale.data.image_folder import list_folder
from seer_scale.data.sources import open_source

SEEN = "folders that are listed already, under another name or above (links, mounts)"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "outside" / "photos" / "a"
    folder.mkdir(parents=True)
    for number in range(10):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"{number}.jpg")
    return folder.parent


@pytest.mark.parametrize("links", [1, 2, 5])
@pytest.mark.parametrize("target", ["..", "../..", "../../..", "/", "."])
@pytest.mark.timeout(60)
def test_links_that_lead_back_up_list_every_photo_once(
    photos: Path, links: int, target: str
) -> None:
    for number in range(links):
        (photos / "a" / f"back{number}").symlink_to(target)
    source = open_source(photos)
    assert len(source) == 10
    count, names = source.left_out.reasons[SEEN]
    assert count == links
    assert names == [f"a/back{number}" for number in range(min(links, 3))]


def test_folders_that_link_to_each_other_end(photos: Path) -> None:
    for name in "bcdef":
        (photos / name).mkdir()
        (photos / name / f"{name}.jpg").write_bytes(b"x")
    for name in "abcdef":
        for other in "abcdef":
            (photos / name / f"to_{other}").symlink_to(photos / other)
    listing = list_folder(str(photos))
    assert listing.images == [
        *(f"a/{n}.jpg" for n in range(10)),
        *(f"{n}/{n}.jpg" for n in "bcdef"),
    ]
    assert listing.left_out.reasons[SEEN][0] == 36


def test_links_to_other_folders_are_followed_once(photos: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "more"
    other.mkdir(parents=True)
    (other / "z.jpg").write_bytes(b"x")
    (photos / "z_link").symlink_to(other.parent)
    (photos / "b_link").symlink_to(other)
    (photos / "real_name").symlink_to(photos / "a")
    listing = list_folder(str(photos))
    # The real folder keeps its name; of two links the first one is followed.
    assert listing.images == [*(f"a/{n}.jpg" for n in range(10)), "b_link/z.jpg"]
    assert listing.left_out.reasons[SEEN] == (2, ["real_name", "z_link/more"])


def test_the_order_of_the_file_system_does_not_matter(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x", "y", "z"):
        (photos / f"link_{name}").symlink_to(photos.parent.parent / "shared")
    (photos.parent.parent / "shared").mkdir()
    (photos.parent.parent / "shared" / "s.jpg").write_bytes(b"x")
    expected = list_folder(str(photos))
    whole = os.scandir

    class Backwards(list[os.DirEntry[str]]):
        def __enter__(self) -> Backwards:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(os, "scandir", lambda path: Backwards(reversed(list(whole(path)))))
    found = list_folder(str(photos))
    assert (found.images, found.left_out.reasons) == (expected.images, expected.left_out.reasons)
    assert "link_x/s.jpg" in found.images
