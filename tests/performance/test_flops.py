"""Operations equal those of torch's FlopCounterMode, forward and backward, for every trunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from seer_scale.models import TRUNKS, build_model
from seer_scale.performance.flops import Flops, count_flops
from seer_scale.planner import plan

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


class WrittenOut(nn.Module):
    """A grouped convolution as what it is, one convolution per group."""

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        parts = zip(x.chunk(layer.groups, 1), layer.weight.chunk(layer.groups), strict=True)
        stride, padding = layer.stride, layer.padding
        return torch.cat([F.conv2d(part, w, None, stride, padding) for part, w in parts], 1)


def write_groups_out(model: nn.Module) -> None:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d) and child.groups > 1:
                assert child.bias is None
                assert child.dilation == (1, 1)
                setattr(parent, name, WrittenOut(child))


def counted(
    trunk: str,
    device: str,
    *,
    written_out: bool = False,
    head: tuple[int, ...] = HEAD,
    prototypes: int = PROTOTYPES,
    sizes: tuple[int, ...] = SIZES,
    counts: tuple[int, ...] = COUNTS,
) -> tuple[int, int]:
    """torch's operations per image of the forward pass, and of both passes."""
    model = build_model(
        trunk, head_dims=head, head_batch_norm=False, prototypes=prototypes, device=device
    ).train()
    if written_out:
        write_groups_out(model)
    images = 2
    crops = [
        torch.empty(images * count, 3, size, size, device=device)
        for size, count in zip(sizes, counts, strict=True)
    ]
    with FlopCounterMode(display=False) as counter:
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


def test_torch_counts_a_grouped_weights_gradient_once_per_group() -> None:
    layer = nn.Conv2d(12, 12, 3, padding=1, groups=4, bias=False)
    x = torch.randn(2, 12, 5, 5, requires_grad=True)
    found = []
    for run in (layer, WrittenOut(layer)):
        with FlopCounterMode(display=False) as counter:
            y = run(x)
            forward = counter.get_total_flops()
            y.square().sum().backward()
        found.append((forward, counter.get_total_flops(), y))
    (grouped, grouped_both, y), (written, written_both, same) = found
    torch.testing.assert_close(y, same)
    assert grouped == written
    assert written_both == 3 * written
    assert grouped_both == (1 + 1 + 4) * grouped


@pytest.mark.parametrize(
    "trunk",
    [
        *("regnety_debug", "regnety_8gf"),
        *[pytest.param(name, marks=pytest.mark.slow) for name in ("regnety_400mf", *LARGE)],
    ],
)
def test_training_is_torchs_count_with_the_groups_written_out(trunk: str) -> None:
    found = mine(trunk)
    assert counted(trunk, "meta", written_out=True) == (found.forward, found.training)


def test_the_plans_figures_are_these() -> None:
    found = plan("debug", "cpu", nodes=1, gpus_per_node=1)
    own, data = found.model, found.batch
    options: dict[str, Any] = {
        "head": own.head_dims,
        "prototypes": own.prototypes,
        "sizes": data.crop_sizes,
        "counts": data.crop_counts,
    }
    raw = counted(own.trunk, "meta", **options)
    forward, training = counted(own.trunk, "meta", written_out=True, **options)
    json = found.to_dict()
    # Equal here; the plan promises 1 %.
    assert json["flops"]["forward"] == pytest.approx(forward, rel=0.01)
    assert json["flops_per_image"] == pytest.approx(training, rel=0.01)
    assert (json["flops"]["forward"], json["flops"]["by_torch_flop_counter"]) == raw
    assert json["flops_per_image"] == training < raw[1]


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
