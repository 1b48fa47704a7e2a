"""The signs of collapse on constructed batches, over ranks, and in words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from harness.pool import Distributed
from seer_scale.objectives import CollapseWatch, collapse_warning
from seer_scale.objectives.collapse import embedding_std, usage_entropy
from tests.objectives.oracles import cosines

HEALTHY = {"loss_over_ln_k": 0.7, "embedding_std": 0.8, "prototype_usage_entropy": 0.98}


def test_embedding_std_is_one_for_directions_all_over_the_sphere() -> None:
    embeddings = F.normalize(torch.randn(4000, 32, generator=torch.manual_seed(0)))
    assert float(embedding_std(embeddings)) == pytest.approx(1, abs=0.01)


def test_embedding_std_equals_torch() -> None:
    embeddings = F.normalize(cosines(7, 5) + 2)
    expected = embeddings.std(dim=0, correction=0).mean() * math.sqrt(5)
    assert float(embedding_std(embeddings)) == pytest.approx(float(expected), rel=1e-6)


def test_embedding_std_is_zero_for_one_point() -> None:
    one = F.normalize(cosines(1, 256).float())
    assert float(embedding_std(one.expand(64, -1))) < 1e-6


def test_usage_entropy_from_one_prototype_to_all() -> None:
    alone = F.one_hot(torch.zeros(8, dtype=torch.long), 4).float()
    pair = F.one_hot(torch.arange(8) % 2, 4).float()
    each = F.one_hot(torch.arange(8) % 4, 4).float()
    entropies = [float(usage_entropy(codes)) for codes in (alone, pair, each)]
    assert entropies == pytest.approx([0, 0.5, 1])


def metrics_of_part(bounds: Any) -> Any:
    start, end = bounds[torch.distributed.get_rank()]
    codes = cosines(8, 5).softmax(dim=1)[start:end]
    return float(embedding_std(F.normalize(cosines(8, 4))[start:end])), float(usage_entropy(codes))


def test_metrics_are_those_of_all_ranks(distributed: Distributed) -> None:
    whole = (
        float(embedding_std(F.normalize(cosines(8, 4)))),
        float(usage_entropy(cosines(8, 5).softmax(dim=1))),
    )
    for part in distributed(metrics_of_part, 2, [(0, 3), (3, 8)]):
        assert part == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        ({"loss_over_ln_k": 0.9995}, "the loss is that of guessing (loss_over_ln_k 0.9995)"),
        ({"loss_over_ln_k": 1.0004}, "the loss is that of guessing (loss_over_ln_k 1.0004)"),
        ({"embedding_std": 0.002}, "nearly the same embedding (embedding_std 0.0020)"),
        (
            {"prototype_usage_entropy": 0.05},
            "hardly any of the prototypes (prototype_usage_entropy 0.0500)",
        ),
    ],
    ids=str,
)
def test_each_sign_is_named_with_its_number_and_remedies(sign: Any, words: Any) -> None:
    warning = collapse_warning({**HEALTHY, **sign})
    assert warning is not None
    assert words in warning
    assert "epsilon (0.03)" in warning
    assert warning.count(" and ") == 0


def test_several_signs_make_one_sentence() -> None:
    warning = collapse_warning({"loss_over_ln_k": 1.0, "embedding_std": 0.0})
    assert warning is not None
    assert "guessing" in warning
    assert "same embedding" in warning
    assert warning.count(".") == warning.count("0.") + warning.count("1.") + 1


@pytest.mark.parametrize(
    "metrics",
    [HEALTHY, {}, {"accuracy": 0.0}, dict.fromkeys(HEALTHY, math.nan), {"loss_over_ln_k": 1.2}],
    ids=str,
)
def test_nothing_is_said_without_a_sign(metrics: Any) -> None:
    assert collapse_warning(metrics) is None


def test_a_run_is_judged_by_its_last_steps_once_it_has_settled() -> None:
    watch = CollapseWatch(from_step=10)
    said: dict[int, str | None] = {}
    for step in range(1, 251):
        collapsed = step > 170  # of steps 151 to 200 three in five
        metrics = HEALTHY | ({"embedding_std": 0.0} if collapsed else {})
        said[step] = watch.observe(step, metrics)
    assert [step for step, text in said.items() if text] == [250]
    assert "embedding_std 0.0000" in str(said[250])
    early = CollapseWatch(from_step=10)
    assert not any(early.observe(step, {"embedding_std": 0.0}) for step in range(1, 110))
