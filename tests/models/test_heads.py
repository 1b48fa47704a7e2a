"""Projection head and prototypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seer_scale.models import initialise
from seer_scale.models.heads import ProjectionHead, Prototypes


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("trunk_width", "head"), [(7392, 129_777_920), (10444, 154_779_904), (28280, 300_892_416)]
)
def test_published_head_sizes(trunk_width: Any, head: Any) -> None:
    with torch.device("meta"):
        assert parameter_count(ProjectionHead(trunk_width, (8192, 8192, 256), False)) == head
        assert parameter_count(Prototypes(256, 16_000)) == 4_096_000


@pytest.mark.parametrize(
    ("batch_norm", "kinds"),
    [
        (False, [nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]),
        (True, [nn.Linear, nn.BatchNorm1d, nn.ReLU] * 2 + [nn.Linear]),
    ],
)
def test_last_layer_is_bare(batch_norm: Any, kinds: Any) -> None:
    head = ProjectionHead(12, (10, 8, 4), batch_norm)
    assert [type(layer) for layer in head.layers] == kinds
    linears = [layer for layer in head.layers if isinstance(layer, nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [
        (12, 10),
        (10, 8),
        (8, 4),
    ]
    assert all(layer.bias is not None for layer in linears)


def test_single_layer_head() -> None:
    assert [type(layer) for layer in ProjectionHead(12, (4,), True).layers] == [nn.Linear]


def test_embeddings_against_a_written_out_mlp() -> None:
    head = ProjectionHead(6, (5, 3), batch_norm=False).double()
    initialise(head, seed=0)
    features = torch.randn(7, 6, dtype=torch.float64)
    layers: Any = head.layers
    first, _, last = layers
    hidden = (features @ first.weight.T + first.bias).clamp(min=0)
    projected = hidden @ last.weight.T + last.bias
    expected = projected / projected.square().sum(1, keepdim=True).sqrt()
    torch.testing.assert_close(head(features), expected)


def test_prototypes_score_by_dot_products() -> None:
    prototypes = Prototypes(dim=4, count=3)
    initialise(prototypes, seed=0)
    embeddings = torch.randn(5, 4)
    scores = prototypes(embeddings)
    for row in range(5):
        for column in range(3):
            expected = sum(embeddings[row] * prototypes.weight[column])
            torch.testing.assert_close(scores[row, column], expected)
    assert [name for name, _ in prototypes.named_parameters()] == ["weight"]


def test_scores_and_unit_norms_stay_float32_under_autocast() -> None:
    head, prototypes = ProjectionHead(16, (32, 8), True), Prototypes(8, 5)
    initialise(head, seed=0)
    initialise(prototypes, seed=0)
    features = torch.randn(6, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.layers(features).dtype == torch.bfloat16
        embeddings = head(features)
        scores = prototypes(embeddings)
        of_low_precision = prototypes(embeddings.bfloat16())
    assert embeddings.dtype == scores.dtype == of_low_precision.dtype == torch.float32
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6))
    torch.testing.assert_close(scores, F.linear(embeddings, prototypes.weight), rtol=0, atol=0)
