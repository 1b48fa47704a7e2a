"""The whole model: passes per resolution, order of crops, queue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from seer_scale.errors import ConfigError
from seer_scale.models import MultiCropModel, build_model, initialise

BATCH, COUNTS, SIZES = 3, (2, 4), (48, 32)


@pytest.fixture
def model() -> MultiCropModel:
    built = build_model("regnety_debug", head_dims=(16, 8), head_batch_norm=True, prototypes=10)
    initialise(built, seed=0)
    return built


def make_crops(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(count * BATCH, 3, size, size, dtype=dtype, generator=generator)
        for count, size in zip(COUNTS, SIZES, strict=True)
    ]


def count_calls(module: nn.Module) -> list[int]:
    """Rows of each call of `module`, filled in while it runs."""
    rows: list[int] = []
    module.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    return rows


def test_grouped_pass_equals_crop_by_crop(model: Any) -> None:
    model = model.double().eval()
    crops = make_crops(torch.float64)
    embeddings, scores = model(crops)
    single = [crop for batch in crops for crop in batch.split(BATCH)]
    expected = torch.cat([model.head(model.trunk(crop)) for crop in single])
    torch.testing.assert_close(embeddings, expected)
    torch.testing.assert_close(scores, expected @ model.prototypes.weight.T)


def test_resolutions_pass_block_by_block_and_the_head_once(model: Any) -> None:
    stem, head, prototypes = map(count_calls, (model.trunk.stem, model.head, model.prototypes))
    last = model.blocks()[-1][-1]
    block, inner = count_calls(last), count_calls(last.activation)
    model(make_crops())
    assert stem == inner == [2 * BATCH, 4 * BATCH]
    assert block == [len(SIZES)]  # one call with a tensor per resolution
    assert head == [6 * BATCH]
    assert prototypes == [6 * BATCH]


def test_units_are_blocks_head_and_prototypes_heavy_layers_first(model: Any) -> None:
    blocks = [block for stage in model.blocks() for block in stage]
    assert model.units(heavy=10**9) == [*blocks, model.head, model.prototypes]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    name = max((n for n in sizes if "trunk_output" in n), key=sizes.__getitem__)
    heaviest = model.get_submodule(name.removesuffix(".weight"))
    units = model.units(heavy=sizes[name] - 1)
    owner = next(block for block in blocks if heaviest in list(block.modules()))
    assert units.index(heaviest) == units.index(owner) - 1
    assert [unit for unit in units if unit in blocks] == blocks


def test_batch_statistics_are_those_of_a_resolution(model: Any) -> None:
    """In training each resolution updates the trunk's statistics once, the head's all at once."""
    model(make_crops())
    counts = {
        name: int(buffer)
        for name, buffer in model.named_buffers()
        if name.endswith("num_batches_tracked")
    }
    assert {count for name, count in counts.items() if name.startswith("trunk.")} == {2}
    assert {count for name, count in counts.items() if name.startswith("head.")} == {1}


def test_embeddings_are_unit_rows(model: Any) -> None:
    embeddings, scores = model(make_crops())
    assert embeddings.shape == (6 * BATCH, 8)
    assert scores.shape == (6 * BATCH, 10)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(6 * BATCH))


def test_queue_rows_are_scored_last(model: Any) -> None:
    model.eval()
    queue = nn.functional.normalize(torch.randn(5, 8), dim=1)
    plain_embeddings, plain_scores = model(make_crops())
    embeddings, scores = model(make_crops(), queue=queue)
    torch.testing.assert_close(embeddings, plain_embeddings)
    torch.testing.assert_close(scores[: 6 * BATCH], plain_scores)
    torch.testing.assert_close(scores[6 * BATCH :], queue @ model.prototypes.weight.T)


def test_low_precision_stops_before_embeddings_and_scores(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings, scores = model(make_crops())
    assert embeddings.dtype == scores.dtype == torch.float32
    scores.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())


def test_every_parameter_gets_a_gradient(model: Any) -> None:
    _, scores = model(make_crops())
    scores.square().sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_blocks_are_the_trunks_own(model: Any) -> None:
    blocks = model.blocks()
    assert [len(stage) for stage in blocks] == [1, 2, 3]
    own = set(model.trunk.modules())
    assert all(block in own for stage in blocks for block in stage)


@pytest.mark.parametrize(
    ("trunk", "total"),
    [
        ("regnety_128gf", 637_419_894 + 129_777_920 + 4_096_000),
        ("regnety_256gf", 1_272_156_138 + 154_779_904 + 4_096_000),
        ("rg_10b", 9_323_934_872 + 300_892_416 + 4_096_000),
    ],
)
def test_seer_models_on_meta(trunk: Any, total: Any) -> None:
    model = build_model(
        trunk, head_dims=(8192, 8192, 256), head_batch_norm=False, prototypes=16_000, device="meta"
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == total
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.prototypes.weight.shape == (16_000, 256)
    embeddings, scores = model.eval()([torch.empty(2, 3, 64, 64, device="meta")])
    assert (embeddings.shape, scores.shape) == ((2, 256), (2, 16_000))


def test_unknown_trunk() -> None:
    with pytest.raises(ConfigError, match="did you mean regnety_debug"):
        build_model("regnety_debgu", head_dims=(8,), head_batch_norm=False, prototypes=2)
