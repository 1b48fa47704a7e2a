"""Features: geometry and values of what goes in, classes, BatchNorm statistics in float64."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from seer_scale.data import open_source
from seer_scale.data.image_kinds import LeftOut
from seer_scale.errors import DataError
from seer_scale.evaluation.features import extract_features, measure_batch_norm, prepare
from seer_scale.models import build_trunk

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Images:
    """A source of images that a test made, with the labels that it gave them."""

    def __init__(self, images: list[Image.Image], labels: list[int | str | None]) -> None:
        self.images, self.labels = images, labels
        self.shard_sizes: NDArray[np.int64] = np.array([len(images)])
        self.version, self.left_out = "0" * 16, LeftOut()

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> bytes:
        data = io.BytesIO()
        self.images[index].save(data, "PNG")
        return data.getvalue()

    def name(self, index: int) -> str:
        return f"image {index}"

    def label(self, index: int) -> int | str | None:
        return self.labels[index]


def noise(seed: int, size: tuple[int, int] = (32, 32)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 100 + 20 * seed, (*size[::-1], 3), generator=generator)
    return Image.fromarray(low.clamp(max=255).to(torch.uint8).numpy())


def source(count: int, labels: list[int | str | None] | None = None) -> Images:
    return Images([noise(seed) for seed in range(count)], labels or [0] * count)


def colours(tensor: torch.Tensor) -> torch.Tensor:
    """Back to 0..255."""
    return ((tensor * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)) * 255).round()


@pytest.mark.parametrize("upright", [False, True])
def test_the_middle_square_is_kept(upright: bool) -> None:
    image = Image.new("RGB", (120, 40))
    for index, colour in enumerate([(255, 0, 0), (10, 200, 30), (0, 0, 255)]):
        image.paste(colour, (40 * index, 0, 40 * (index + 1), 40))
    if upright:
        image = image.transpose(Image.Transpose.ROTATE_90)
    prepared = prepare(image, 20)
    assert prepared.shape == (3, 20, 20)
    assert prepared.dtype == torch.float32
    shown = colours(prepared)
    inner = shown[:, 2:-2, 2:-2]  # bicubic mixes across the bands' borders
    assert (inner == torch.tensor([10.0, 200.0, 30.0]).view(3, 1, 1)).all()
    # The borders lie at the edges of the crop, on both sides alike: neither shifted nor squeezed.
    axis = 1 if upright else 2
    profile = shown[1].mean(2 - axis)
    torch.testing.assert_close(profile, profile.flip(0))


@pytest.mark.parametrize("size", [(7, 50), (50, 7), (20, 20), (21, 20), (300, 211)])
def test_any_image_becomes_a_square(size: tuple[int, int]) -> None:
    prepared = prepare(Image.new("RGB", size, (128, 64, 0)), 20)
    assert prepared.shape == (3, 20, 20)
    expected = (torch.tensor([128, 64, 0]) / 255 - MEAN) / STD
    torch.testing.assert_close(prepared, expected.view(3, 1, 1).expand(3, 20, 20))


def test_an_image_of_the_size_is_taken_as_it_is() -> None:
    image = noise(3)
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)
    assert torch.equal(colours(prepare(image, 32)), pixels.float())


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_features_are_those_of_each_image_alone(batch_size: int) -> None:
    trunk = build_trunk("regnety_debug").eval()
    images = source(5, ["b", "a", "b", "c", "a"])
    features, labels = extract_features(trunk, images, size=32, batch_size=batch_size)
    with torch.inference_mode():
        expected = torch.cat([trunk(prepare(image, 32)[None]) for image in images.images])
    # a batch's convolutions sum in another order than a single image's
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert features.dtype == torch.float32
    assert labels.tolist() == [1, 0, 1, 2, 0]
    assert labels.dtype == torch.int64


class Pooled(nn.Module):
    """A trunk that costs nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3)) * self.scale


def test_classes_are_numbered_by_the_text_of_their_labels() -> None:
    _, labels = extract_features(Pooled(), source(4, [9, 10, 9, 2]), size=8)
    assert labels.tolist() == [2, 0, 2, 1]  # "10" < "2" < "9"
    _, shuffled = extract_features(Pooled(), source(4, ["2", "9", "10", "9"]), size=8)
    assert shuffled.tolist() == [1, 2, 0, 2]


def test_an_image_folder_gives_a_class_per_folder(tmp_path: Path) -> None:
    for index, folder in enumerate(["cat", "ant", "cat"]):
        (tmp_path / folder).mkdir(exist_ok=True)
        noise(index).save(tmp_path / folder / f"{index}.png")
    features, labels = extract_features(Pooled(), open_source(tmp_path), size=32)
    assert labels.tolist() == [0, 1, 1]
    expected = torch.stack([prepare(noise(index), 32).mean((1, 2)) for index in (1, 0, 2)])
    torch.testing.assert_close(features, expected)


def test_an_image_without_label_is_named() -> None:
    with pytest.raises(DataError, match=r"image 2 has no label: .*one folder per class.*\.cls"):
        extract_features(Pooled(), source(4, ["a", "b", None, None]), size=8)


def test_an_image_that_does_not_decode_is_named(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    noise(0).save(tmp_path / "cat" / "0.png")
    (tmp_path / "cat" / "1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png.*not an image"):
        extract_features(Pooled(), open_source(tmp_path), size=32)


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_statistics_are_the_mean_over_batches(training: bool) -> None:
    trunk = build_trunk("regnety_debug").train(training)
    images = source(6)
    before = {name: p.detach().clone() for name, p in trunk.named_parameters()}
    trunk.stem[1].running_mean.fill_(50)  # what was there before must not count
    measure_batch_norm(trunk, images, size=32, batch_size=3)

    means, variances = [], []
    weight = trunk.stem[0].weight.detach().double()
    for first in range(0, 6, 3):
        batch = torch.stack([prepare(image, 32) for image in images.images[first : first + 3]])
        x = F.conv2d(batch.double(), weight, stride=2, padding=1).transpose(0, 1).flatten(1)
        means.append(x.mean(1))
        variances.append(x.var(1))  # unbiased, as torch keeps it
    norm = trunk.stem[1]
    expected = {"running_mean": means, "running_var": variances}
    for name, values in expected.items():
        actual = getattr(norm, name).double()
        torch.testing.assert_close(actual, torch.stack(values).mean(0), rtol=1e-4, atol=1e-5)
    assert int(norm.num_batches_tracked) == 2
    assert norm.momentum == 0.1
    assert trunk.training == training
    assert all(torch.equal(before[name], p) for name, p in trunk.named_parameters())


def test_a_last_batch_of_one_image_does_no_harm() -> None:
    """The deepest feature map is 1 x 1 here: a single image has no variance."""
    trunk = build_trunk("regnety_debug")
    measure_batch_norm(trunk, source(4), size=16, batch_size=3)
    assert all(buffer.isfinite().all() for buffer in trunk.buffers())
