"""Crops of labelled images: what they depend on, their colours, and batches made ahead."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from seer_scale.data.middle_crop import MiddleCrop
from seer_scale.evaluation.datasets.labelled import open_labelled
from seer_scale.evaluation.labelled_crops import (
    AHEAD,
    TrainCrop,
    crop_batches,
    make_ahead,
)
from seer_scale.preprocessing import MEAN, STD
from tests.evaluation.patterns import write_patterns


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("patterns"))


def test_crops_follow_from_seed_and_position_alone(data: Path) -> None:
    images = open_labelled(str(data)).train
    crop = TrainCrop(32, 5, colour_distortion=1.0, blur=0.5)
    parts = [[(3, 103), (9, 209)], [(3, 103)], [(3, 104)]]
    first, second, other = (x for x, _ in crop_batches(images, iter(parts), crop, workers=3))
    assert first.shape == (2, 3, 32, 32)
    assert torch.equal(first[:1], second)
    assert not torch.equal(second, other)
    assert not torch.equal(TrainCrop(32, 6)(images.source.read(3), 103), other[0])


def test_plain_crops_keep_their_colours(data: Path) -> None:
    images = open_labelled(str(data)).train
    disc = images.source.read(next(i for i in range(64) if "disc" in images.source.name(i)))
    from seer_scale.data.decode import decode

    whole = np.array(decode(disc)).reshape(-1, 3).mean(0)
    for bicubic in (False, True):
        spread = [TrainCrop(32, 0, bicubic=bicubic)(disc, n).mean((1, 2)) for n in range(40)]
        mean = torch.stack(spread).mean(0) * torch.tensor([0.229, 0.224, 0.225])
        mean = 255 * (mean + torch.tensor([0.485, 0.456, 0.406]))
        assert np.abs(mean.numpy() - whole).max() < 25
        assert all((x - x.mean()).abs().max() > 1e-3 for x in spread)  # none is gray


@pytest.mark.parametrize("bicubic", [False, True])
@pytest.mark.parametrize("resize", [None, 32, 40])
def test_a_test_crop_is_torchvisions(data: Path, resize: int | None, bicubic: bool) -> None:
    images = open_labelled(str(data)).val
    mode = (
        transforms.InterpolationMode.BICUBIC if bicubic else transforms.InterpolationMode.BILINEAR
    )
    transform = transforms.Compose(
        [
            transforms.Resize(resize or 37, interpolation=mode),  # 32 x 256 / 224
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    crop = MiddleCrop(32, resize, bicubic)
    for index in range(4):
        expected = transform(Image.open(images.source.name(index)).convert("RGB"))
        torch.testing.assert_close(crop(images.source.read(index), 0), expected)


def levels(crop: torch.Tensor) -> torch.Tensor:
    """Back to 0..255."""
    return 255 * (crop * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1))


def encoded(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("bicubic", [False, True])
def test_train_crops_cover_from_a_twelfth_of_the_image_to_all_of_it(bicubic: bool) -> None:
    ramp = np.arange(256, dtype=np.uint8)
    pixels = np.zeros((256, 256, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp[None, :], ramp[:, None]  # red is x, green is y
    data, crop = encoded(pixels), TrainCrop(32, 3, bicubic=bicubic)
    shares = []
    for position in range(300):
        found = levels(crop(data, position))
        # From middle to middle of the outermost of 32 pixels.
        sides = [float(plane.max() - plane.min()) * 32 / 31 for plane in found[:2]]
        shares.append(sides[0] * sides[1] / 255**2)
    # Uniform from 0.08 to 1, but for the largest, of which some do not fit in: the mean of 300 is
    # within 0.05 of 0.5 unless chance is at four standard deviations.
    assert 0.07 < min(shares) < 0.12
    assert max(shares) > 0.85
    assert 0.44 < sum(shares) / 300 < 0.58


def test_only_bicubic_crops_go_beyond_the_levels_of_the_image() -> None:
    pixels = np.full((24, 24, 3), 64, np.uint8)
    pixels[:, ::8] = pixels[:, 1::8] = pixels[:, 2::8] = pixels[:, 3::8] = 192
    data = encoded(pixels)
    for bicubic in (False, True):
        found = levels(TrainCrop(96, 0, bicubic=bicubic)(data, 0))
        assert (found.min() < 63 and found.max() > 193) == bicubic


def test_batches_are_made_ahead_in_order_even_without_an_end() -> None:
    asked: list[int] = []

    def endless() -> Iterator[list[int]]:
        number = 0
        while True:
            asked.append(number)
            yield [number, number + 100]
            number += 1

    made = make_ahead(endless(), lambda item: item * 2, workers=3)
    assert [next(made) for _ in range(4)] == [[2 * n, 2 * n + 200] for n in range(4)]
    assert len(asked) == 4 + AHEAD - 1
    made.close()  # type: ignore[attr-defined]
