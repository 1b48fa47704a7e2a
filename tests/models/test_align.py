"""Aligned channels, on one process: index arithmetic against a mask, the trunk against itself."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from seer_scale.errors import CheckpointError
from seer_scale.models import (
    TRUNKS,
    MultiCropModel,
    align_channels,
    build_model,
    build_trunk,
    paddings_of,
    seeded_values,
)
from seer_scale.models.padding import Axis, Padding
from seer_scale.optim.filling import fill
from seer_scale.optim.slices import Slice, with_padding
from seer_scale.serving import export_trunk

PADDINGS = {
    "grouped convolution": Padding((Axis(2, 3, 4), Axis(1, 3, 4), Axis(1, 3, 3), Axis(1, 2, 2))),
    "pointwise": Padding((Axis(3, 2, 5), Axis(2, 3, 4), Axis(1, 1, 1), Axis(1, 1, 1))),
    "inputs only": Padding((Axis(1, 4, 4), Axis(2, 1, 3))),
    "vector": Padding((Axis(3, 3, 7),)),
}


def mask_of(padding: Padding) -> Tensor:
    """Which elements of the padded tensor are real, written out per dimension."""
    mask = torch.ones(padding.held_shape, dtype=torch.bool)
    for dim, axis in enumerate(padding.axes):
        real = [i % axis.held < axis.real for i in range(axis.groups * axis.held)]
        shape = [1] * mask.dim()
        shape[dim] = len(real)
        mask &= torch.tensor(real).view(shape)
    return mask.flatten()


@pytest.mark.parametrize("padding", PADDINGS.values(), ids=PADDINGS)
def test_any_run_of_a_padded_tensor_is_a_run_of_the_real_one(padding: Padding) -> None:
    mask = mask_of(padding)
    real = torch.arange(1.0, int(mask.sum()) + 1)
    assert torch.Size(padding.real_shape).numel() == len(real)
    held = torch.zeros(len(mask))
    held[mask] = real
    for start, stop in itertools.combinations(range(0, len(mask) + 1, 3), 2):
        run, inside = held[start:stop], mask[start:stop]
        before = int(mask[:start].sum())
        assert padding.before(start) == before
        taken = padding.take_out(run, start)
        assert torch.equal(taken, run[inside])
        assert torch.equal(taken, real[before : before + len(taken)])
        assert torch.equal(padding.put_in(taken, start, stop - start), run)
    assert padding.before(len(mask)) == len(real)


def test_a_slice_loses_its_padding_and_values_gain_it() -> None:
    padding = PADDINGS["pointwise"]
    mask, shape = mask_of(padding), padding.held_shape
    real = torch.arange(float(mask.sum()))
    values = with_padding(lambda name, start, stop: real[start:stop], {"w": padding})
    held = Slice("w", shape, 17, values("w", 17, 90), -values("w", 17, 90), padding)
    part = held.without_padding()
    first = int(mask[:17].sum())
    assert (part.shape, part.offset, part.padding) == (padding.real_shape, first, None)
    assert torch.equal(part.values, real[first : first + len(part.values)])
    assert torch.equal(part.momentum, -part.values)
    assert torch.equal(values("other", 3, 9), real[3:9])
    whole = Slice("v", (5,), 0, real[:5], real[:5])
    assert whole.without_padding() is whole  # a view still: nothing is copied


def build(multiple: int) -> MultiCropModel:
    """The debug model in float64, with the values of seed 0."""
    model = build_model(
        "regnety_debug", head_dims=[8, 4], head_batch_norm=False, prototypes=5, device="meta"
    )
    values = seeded_values(model, 0)
    align_channels(model.trunk, multiple)
    values = with_padding(values, paddings_of(model))
    model.to_empty(device="cpu").double()
    fill(model, values)
    # BatchNorm's scale and shift and its statistics are all alike until something is learned.
    generator = torch.Generator().manual_seed(0)
    paddings = paddings_of(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.dim() == 1:
            padding = paddings.get(name, Padding((Axis(1, len(tensor), len(tensor)),)))
            noise = torch.rand(padding.real_shape, generator=generator, dtype=torch.float64)
            with torch.no_grad():
                tensor.add_(padding.put_in(noise, 0, len(tensor)))
    return model


def crops() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(4, 3, size, size, generator=generator, dtype=torch.float64) for size in (64, 32)
    ]


@pytest.mark.parametrize("multiple", [3, 8, 12])
def test_outputs_and_every_gradient_are_those_without(multiple: int) -> None:
    plain, aligned = build(1), build(multiple)
    for model in (plain, aligned):
        embeddings, scores = model(crops())
        (scores.square().sum() + embeddings[:, 0].exp().sum()).backward()
    paddings = paddings_of(aligned)
    assert paddings
    for name, parameter in plain.named_parameters():
        expected, actual = parameter.grad, aligned.get_parameter(name).grad
        assert expected is not None
        assert actual is not None
        if name in paddings:
            flat = actual.flatten()
            assert not flat[~mask_of(paddings[name])].any(), name  # exactly, not nearly
            actual = paddings[name].take_out(flat, 0).view(expected.shape)
        scale = float(expected.abs().max())
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12 * scale, msg=name)
    for model in (plain, aligned):
        model.eval()
    torch.testing.assert_close(aligned(crops()), plain(crops()), rtol=1e-12, atol=1e-12)


def test_one_changes_nothing() -> None:
    model = build_trunk("regnety_debug", device="meta")
    before = repr(model)
    align_channels(model, 1)
    assert (repr(model), paddings_of(model)) == (before, {})


@pytest.mark.parametrize("name", TRUNKS)
def test_every_group_of_every_trunk_becomes_a_multiple(name: str) -> None:
    trunk = build_trunk(name, device="meta")
    align_channels(trunk, 8)
    shapes = {key: tuple(tensor.shape) for key, tensor in trunk.state_dict().items()}
    for key, module in trunk.named_modules():
        if isinstance(module, nn.Conv2d):
            shape = (module.out_channels, module.in_channels // module.groups)
            assert shapes[f"{key}.weight"][:2] == shape
            assert shape[0] // module.groups % 8 == 0
            assert shape[1] % 8 == 0 or shape[1] == 3  # an image has three
        elif isinstance(module, nn.BatchNorm2d):
            assert shapes[f"{key}.weight"] == (module.num_features,)
    plain = build_trunk(name, device="meta").state_dict()
    for key, tensor in plain.items():
        real = shapes[key]
        if key in trunk.paddings:
            assert trunk.paddings[key].held_shape == shapes[key]
            real = trunk.paddings[key].real_shape
        assert real == tuple(tensor.shape), key
    assert trunk(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, trunk.width)


def test_an_aligned_trunk_is_not_exported(tmp_path: Path) -> None:
    trunk = build(3).trunk
    with pytest.raises(CheckpointError, match=r"are not those of regnety_debug"):
        export_trunk(trunk, tmp_path / "trunk", trunk="regnety_debug")
    assert not (tmp_path / "trunk").exists()
