"""Stored features: the protocol's crops, what is kept, what is computed again, and by whom."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from seer_scale.errors import ConfigError, DataError
from seer_scale.evaluation.datasets.labelled import open_labelled
from seer_scale.evaluation.feature_store import (
    BLOCK,
    block_path,
    stored_features,
    weights_digest,
)
from seer_scale.preprocessing import MEAN, STD
from tests.evaluation.contexts import context

SIZE = 32


def digests(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.npy"))
    }


def store_on_ranks(data: str, folder: str, maps: list[str]) -> list[int]:
    train = open_labelled(data).train
    found = stored_features(context(data, Path(folder)), train, size=SIZE, maps=maps)
    return [found[name].width for name in maps]


def test_features_are_torchvisions_test_transform_and_the_trunk(
    few_shapes: Path, tmp_path: Path
) -> None:
    own = context(few_shapes, tmp_path)
    val = open_labelled(str(few_shapes)).val
    stored = stored_features(own, val, size=SIZE)["avgpool"]
    transform = transforms.Compose(
        [
            transforms.Resize(round(SIZE * 256 / 224)),
            transforms.CenterCrop(SIZE),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    images = [
        transform(Image.open(val.source.name(index)).convert("RGB")) for index in range(len(val))
    ]
    with torch.inference_mode():
        expected = own.trunk(torch.stack(images))
    torch.testing.assert_close(stored.all(), expected, rtol=1e-4, atol=1e-5)
    assert stored.width == 152


@pytest.mark.long
def test_ranks_share_the_work_and_bits_stay_the_same(
    distributed: Callable[..., list[Any]], shapes: Path, tmp_path: Path
) -> None:
    maps = ["res3", "avgpool", "gem"]
    written = {}
    for world_size in (1, 2, 4):
        folder = tmp_path / str(world_size)
        widths = distributed(store_on_ranks, world_size, str(shapes), str(folder), maps)
        assert widths == [[128, 152, 152]] * world_size
        written[world_size] = digests(folder)
    assert len(written[1]) == 3 * 5  # 1100 images in blocks of 256
    assert written[1] == written[2] == written[4]


def test_only_what_is_missing_or_damaged_is_computed(few_shapes: Path, tmp_path: Path) -> None:
    said: list[str] = []
    own = context(few_shapes, tmp_path, say=said.append)
    train = open_labelled(str(few_shapes)).train
    first = stored_features(own, train, size=SIZE)["avgpool"]
    stored_features(own, train, size=SIZE)
    assert len(said) == 1
    before = first.all()
    path = block_path(first.folder, 0)
    path.write_bytes(path.read_bytes()[:-50])  # killed in a copy, or a full disk
    assert torch.equal(stored_features(own, train, size=SIZE)["avgpool"].all(), before)
    assert len(said) == 2
    other = context(few_shapes, tmp_path / "other", say=said.append, features=tmp_path / "features")
    stored_features(other, train, size=SIZE)
    assert len(said) == 2  # another task on the same model and images


def test_other_weights_images_sizes_and_maps_are_others(few_shapes: Path, tmp_path: Path) -> None:
    own = context(few_shapes, tmp_path)
    data = open_labelled(str(few_shapes))
    folders = [stored_features(own, data.train, size=SIZE)["avgpool"].folder]
    folders.append(stored_features(own, data.val, size=SIZE)["avgpool"].folder)
    folders.append(stored_features(own, data.train.subset([0, 5]), size=SIZE)["avgpool"].folder)
    folders.append(stored_features(own, data.train, size=SIZE + 8)["avgpool"].folder)
    folders.append(stored_features(own, data.train, size=SIZE, maps=["res4"])["res4"].folder)
    file = data.train.source.name(7)
    os.utime(file, (1, 1))  # written anew under the same name
    folders.append(stored_features(own, data.train, size=SIZE)["avgpool"].folder)
    stem: Any = own.trunk.stem
    with torch.no_grad():
        stem[0].weight[0, 0, 0, 0] += 1e-3
    folders.append(stored_features(own, data.train, size=SIZE)["avgpool"].folder)
    assert len(set(folders)) == len(folders)


def test_the_number_of_batches_seen_is_no_part_of_the_weights(
    tmp_path: Path, few_shapes: Path
) -> None:
    trunk = context(few_shapes, tmp_path).trunk
    stem: Any = trunk.stem
    before = weights_digest(trunk)
    stem[1].num_batches_tracked += 1
    assert weights_digest(trunk) == before
    stem[1].running_mean += 1
    assert weights_digest(trunk) != before


def test_blocks_have_their_rows(shapes: Path, tmp_path: Path) -> None:
    own = context(shapes, tmp_path)
    val = open_labelled(str(shapes)).val
    stored = stored_features(own, val, size=SIZE)["avgpool"]
    blocks = list(stored.blocks())
    assert [(first, len(rows)) for first, rows in blocks] == [(0, BLOCK), (BLOCK, 300 - BLOCK)]
    whole = stored.all().numpy()
    assert np.array_equal(np.concatenate([rows for _, rows in blocks]), whole)
    assert [first for first, _ in stored.blocks(1, 2)] == [BLOCK]


def test_what_cannot_be_used_is_named(few_shapes: Path, tmp_path: Path) -> None:
    own = context(few_shapes, tmp_path)
    train = open_labelled(str(few_shapes)).train
    with pytest.raises(ConfigError, match=r"maps has res5, but this trunk has res2, res3, res4, a"):
        stored_features(own, train, size=SIZE, maps=["res5"])
    (tmp_path / "file").write_text("")
    blocked = context(few_shapes, tmp_path, features=tmp_path / "file")
    with pytest.raises(DataError, match=r"features cannot be written to .*--features FOLDER"):
        stored_features(blocked, train, size=SIZE)
    broken = tmp_path / "broken"
    for part in ("train", "val"):
        for name in ("a", "b"):
            (broken / part / name).mkdir(parents=True)
            Image.new("RGB", (40, 40)).save(broken / part / name / "0.png")
    (broken / "train" / "a" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"a/1\.png cannot be used \(not an image\)"):
        stored_features(own, open_labelled(str(broken)).train, size=SIZE)
