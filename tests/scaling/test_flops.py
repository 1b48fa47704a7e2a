"""Against torch's FlopCounterMode: forward and backward of every trunk, to the last operation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from seer_scale.models import TRUNKS, build_model
from seer_scale.scaling.flops import Flops, count_flops

HEAD, PROTOTYPES, SIZES, COUNTS = (64, 16), 50, (96, 65), (2, 3)
LARGE = ("regnety_64gf", "regnety_128gf", "regnety_256gf", "rg_10b")
QUICK = ("regnety_debug", "regnety_200mf", "regnety_8gf", "regnety_32gf")


def mine(trunk: str, **more: Any) -> Flops:
    return count_flops(
        TRUNKS[trunk],
        crop_sizes=SIZES,
        crop_counts=COUNTS,
        head_dims=HEAD,
        prototypes=PROTOTYPES,
        **more,
    )


def per_weight_and_input(
    grad: Any, x: Any, weight: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """A convolution's backward pass: one forward's worth for each gradient that is asked for."""
    mask = _[-1]
    return sum(mask[:2]) * conv_flop_count(x, weight, grad)


def counted(trunk: str, device: str, mapping: dict[Any, Any] | None = None) -> tuple[int, int]:
    """Operations per image of the forward pass, and of both."""
    model = build_model(
        trunk, head_dims=HEAD, head_batch_norm=False, prototypes=PROTOTYPES, device=device
    ).train()
    images = 2
    crops = [
        torch.empty(images * count, 3, size, size, device=device)
        for size, count in zip(SIZES, COUNTS, strict=True)
    ]
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        _, scores = model(crops)
        forward = counter.get_total_flops()
        scores.sum().backward()
    return forward // images, counter.get_total_flops() // images


@pytest.mark.parametrize(
    "trunk",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in TRUNKS],
)
def test_every_trunk_counts_as_torch_does(trunk: str) -> None:
    found = mine(trunk)
    assert counted(trunk, "meta") == (found.forward, found.torch_counter)


@pytest.mark.parametrize(
    "trunk", ["regnety_debug", pytest.param("regnety_8gf", marks=pytest.mark.slow)]
)
def test_training_is_torchs_count_with_grouped_gradients_counted_once(trunk: str) -> None:
    mapping = {torch.ops.aten.convolution_backward: per_weight_and_input}
    found = mine(trunk)
    _, both = counted(trunk, "meta", mapping)
    assert both == pytest.approx(found.training, rel=0.01)
    assert both == found.training


def test_real_tensors_count_the_same() -> None:
    found = mine("regnety_debug")
    assert counted("regnety_debug", "cpu") == (found.forward, found.torch_counter)


def test_recomputing_every_block_repeats_all_but_stem_and_head() -> None:
    blocks = range(TRUNKS["regnety_debug"].depth)
    whole, none = mine("regnety_debug", recomputed=blocks), mine("regnety_debug")
    assert none.recompute == 0
    assert whole.training == none.training
    stem = sum(2 * 9 * 3 * 32 * ((s + 1) // 2) ** 2 * n for s, n in zip(SIZES, COUNTS, strict=True))
    head = (
        2
        * sum(COUNTS)
        * (
            TRUNKS["regnety_debug"].stages[-1].width * HEAD[0]
            + HEAD[0] * HEAD[1]
            + HEAD[1] * PROTOTYPES
        )
    )
    assert whole.recompute == whole.forward - stem - head


def test_seer_takes_what_is_published_of_it() -> None:
    found = count_flops(
        TRUNKS["regnety_256gf"],
        crop_sizes=(224,),
        crop_counts=(1,),
        head_dims=(1,),
        prototypes=2,
    )
    assert found.by_size[224] / 2e9 == pytest.approx(254.37, abs=0.01)
