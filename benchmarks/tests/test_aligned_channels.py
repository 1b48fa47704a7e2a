"""The table of aligned channels equals the docs, and its counts equal those of real models."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.aligned_channels import DOCUMENT, row, table
from seer_scale.models import align_channels, build_trunk


def test_the_document_has_the_table_that_is_printed() -> None:
    assert table() in DOCUMENT.read_text()


def counted(multiple: int) -> tuple[int, int]:
    """Parameters of a trunk, and multiplications of its convolutions on one image."""
    trunk, products = build_trunk("regnety_256gf", device="meta"), []
    align_channels(trunk, multiple)
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(
                lambda conv, _, out: products.append(conv.weight.numel() * out[0, 0].numel())
            )
    trunk.eval()(torch.empty(1, 3, 224, 224, device="meta"))
    return sum(parameter.numel() for parameter in trunk.parameters()), sum(products)


def test_a_line_of_it_is_what_the_modules_compute() -> None:
    (parameters, flops), (more_parameters, more_flops) = counted(1), counted(8)
    assert row("regnety_256gf", 8) == [
        "`regnety_256gf`",
        "373 -> 376",
        "746, 1492, 4103, 10444",
        "752, 1504, 4136, 10528",
        f"+{100 * (more_parameters / parameters - 1):.2f} %",
        f"+{100 * (more_flops / flops - 1):.2f} %",
    ]
