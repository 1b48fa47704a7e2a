"""Linear probe against scikit-learn and a slow loop of SGD; a killed probe resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from seer_scale.errors import ConfigError
from seer_scale.evaluation.datasets.labelled import open_labelled
from seer_scale.evaluation.feature_store import stored_features
from seer_scale.evaluation.logistic import fit_logistic
from seer_scale.evaluation.tasks import linear
from seer_scale.evaluation.tasks.linear_heads import HeadKey, Heads, build_head
from seer_scale.evaluation.tasks.linear_training import train_heads
from tests.evaluation.contexts import context

SIZE = 32


@pytest.mark.long
@pytest.mark.parametrize("solver", ["sgd", "lbfgs"])
def test_top1_is_that_of_scikit_learns_logistic_regression(
    shapes: Path, tmp_path: Path, solver: str
) -> None:
    decay = 1e-2
    options = linear.Options(
        maps=["avgpool"],
        augment=False,
        solver=solver,
        size=SIZE,
        weight_decay=decay,
        epochs=60,
        lr_steps=[40, 50],
        base_lr=[0.1],
        batch=128,
    )
    own = context(shapes, tmp_path)
    result = linear.run(own, options)
    data = open_labelled(str(shapes))
    train, val = (
        stored_features(own, part, size=SIZE)["avgpool"].all().double().numpy()
        for part in (data.train, data.val)
    )
    scaler = StandardScaler().fit(train)
    model = LogisticRegression(C=1 / (decay * len(train)), max_iter=5000, tol=1e-8)
    model.fit(scaler.transform(train), data.train.targets)
    expected = model.score(scaler.transform(val), data.val.targets)
    assert expected > 2 / 12  # twice chance: the features say something
    # Exact where both reach the optimum; SGD stops near it, with statistics of its batches.
    assert abs(result.metrics["top1"] - expected) <= (0.0034 if solver == "lbfgs" else 0.015)


def test_the_optimum_is_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(150, 5, generator=generator, dtype=torch.float64)
    targets = (features[:, 0] + torch.randn(150, generator=generator) > 0).long()
    targets += (features[:, 1] > 0.5).long()
    weight, bias = fit_logistic(features, targets, 3, weight_decay=1e-2)
    model = LogisticRegression(C=1 / (1e-2 * 150), max_iter=5000, tol=1e-10).fit(features, targets)
    ours = features @ weight.T + bias
    theirs = torch.tensor(model.decision_function(features))
    assert torch.allclose(ours.log_softmax(1), theirs.log_softmax(1), atol=1e-4)


def test_heads_trained_together_equal_each_alone_and_plain_sgd() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = [HeadKey("res4", 0.3), HeadKey("res4", 0.03), HeadKey("avgpool", 0.3)]
    keys += [HeadKey("avgpool_plain", 0.3)]
    widths, cells = {"res4": 12, "avgpool": 6}, {"res4": (2, 1), "avgpool": (1, 1)}
    settings: dict[str, Any] = {
        "lr_scale": 0.5,
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 0.1,
    }
    heads = Heads(
        {key: build_head(key, widths[key.map], cells[key.map], 4, 0) for key in keys}, **settings
    )
    loop = [build_head(key, widths[key.map], cells[key.map], 4, 0) for key in keys]
    velocities = [[torch.zeros_like(p) for p in head.parameters()] for head in loop]
    for step in range(4):
        vectors = {
            name: torch.randn(8, width, generator=generator) for name, width in widths.items()
        }
        targets = torch.randint(0, 4, (8,), generator=generator)
        factor = 0.1 if step == 3 else 1.0
        heads.step(vectors, targets, factor)
        for key, head, velocity in zip(keys, loop, velocities, strict=True):
            logits = head.train()(vectors[key.map])
            head.zero_grad()
            torch.nn.functional.cross_entropy(logits, targets).backward()
            with torch.no_grad():
                for (name, parameter), past in zip(head.named_parameters(), velocity, strict=True):
                    decay = 0.1 if name.startswith("linear") else 0.0
                    assert parameter.grad is not None
                    gradient = parameter.grad + decay * parameter
                    past.mul_(0.9).add_(gradient)
                    parameter.sub_(key.base_lr * 0.5 * factor * (gradient + 0.9 * past))
    for key, head in zip(keys, loop, strict=True):
        for name, tensor in head.state_dict().items():
            torch.testing.assert_close(heads.heads[key].state_dict()[name], tensor)


def test_the_rate_of_an_epoch_is_scaled_by_the_batch_and_the_steps_that_are_past(
    few_shapes: Path, tmp_path: Path
) -> None:
    options = linear.Options(
        size=SIZE,
        epochs=4,
        base_lr=[0.5],
        lr_steps=[1, 3],
        lr_gamma=0.1,
        momentum=0.9,
        nesterov=True,
        weight_decay=0.0,
        augment=False,
        batch=256,  # of 96 images: one step of all of them in every epoch
    )
    own, data = context(few_shapes, tmp_path), open_labelled(str(few_shapes))
    features = stored_features(own, data.train, size=SIZE)["avgpool"].all()
    key = HeadKey("avgpool", 0.5)
    loop = build_head(key, features.shape[1], (1, 1), len(data.classes), options.seed).train()
    velocities = [torch.zeros_like(parameter) for parameter in loop.parameters()]
    for rate in (0.1875, 0.01875, 0.01875, 0.001875):  # 0.5 x 96 / 256 and its tenths
        loop.zero_grad()
        torch.nn.functional.cross_entropy(loop(features), data.train.targets).backward()
        with torch.no_grad():
            for parameter, velocity in zip(loop.parameters(), velocities, strict=True):
                assert parameter.grad is not None
                velocity.mul_(0.9).add_(parameter.grad)
                parameter.sub_(rate * (parameter.grad + 0.9 * velocity))
    heads = train_heads(own, data, options, ["avgpool"], {"avgpool": features.shape[1]})
    for name, tensor in heads.heads[key].state_dict().items():
        # The images of a step come in another order, so that sums differ by rounding.
        torch.testing.assert_close(tensor, loop.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_no_crop_comes_twice_in_any_step_or_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nine copies of one picture, so that vectors are equal only if crops are."""
    noise, other = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    for part, count in (("train", 9), ("val", 1)):
        for number in range(count):
            path = tmp_path / "data" / part / "noise" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noise).save(path)
        (tmp_path / "data" / part / "other").mkdir()  # one class alone is refused
        Image.fromarray(other).save(tmp_path / "data" / part / "other" / "0.png")
    seen: list[torch.Tensor] = []
    step = Heads.step

    def recorded(self: Heads, vectors: Any, *rest: Any) -> float:
        seen.extend(vectors["avgpool"])
        return step(self, vectors, *rest)

    monkeypatch.setattr(Heads, "step", recorded)
    options = linear.Options(size=SIZE, epochs=3, base_lr=[0.1], batch=4)
    own = context(tmp_path / "data", tmp_path / "out")
    train_heads(own, open_labelled(str(tmp_path / "data")), options, ["avgpool"], {"avgpool": 152})
    assert len(seen) == 3 * 2 * 4
    assert len({tuple(vector.tolist()) for vector in seen}) == len(seen)


def test_a_killed_probe_goes_on_and_ends_with_the_same_numbers(
    few_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = linear.Options(size=SIZE, epochs=3, batch=48, base_lr=[0.1, 0.01], lr_steps=[2])
    whole = linear.run(context(few_shapes, tmp_path / "whole"), options)

    steps = 0
    step = Heads.step

    def killed(self: Heads, *arguments: object) -> float:
        nonlocal steps
        steps += 1
        if steps == 4:  # in the second epoch
            raise KeyboardInterrupt
        return step(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Heads, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        linear.run(context(few_shapes, tmp_path / "cut"), options)
    monkeypatch.setattr(Heads, "step", step)
    said: list[str] = []
    rest = linear.run(context(few_shapes, tmp_path / "cut", say=said.append), options)
    assert "resuming after epoch 1 of 3" in said
    assert rest.metrics == whole.metrics
    assert rest.details == whole.details
    (first,), (second,) = (
        list((tmp_path / name).glob("heads-*.safetensors")) for name in ("whole", "cut")
    )
    assert first.read_bytes() == second.read_bytes()
    other = linear.run(
        context(few_shapes, tmp_path / "cut"), options.model_copy(update={"seed": 1})
    )
    assert other.details != whole.details


def test_learning_rates_steps_and_heads_are_as_asked(few_shapes: Path, tmp_path: Path) -> None:
    options = linear.Options(size=SIZE, epochs=1, batch=32, base_lr=[0.1, 0.01], augment=False)
    result = linear.run(context(few_shapes, tmp_path), options)
    assert [(row["map"], row["base_lr"]) for row in result.details["heads"]] == [
        (name, rate) for name in ("res3", "res4", "avgpool") for rate in (0.1, 0.01)
    ]
    best = max(row["top1"] for row in result.details["heads"])
    assert result.metrics["top1"] == best
    assert np.isclose(result.details["per_class"]["disc"] * 4 % 1, 0)
    assert [path.name for path in result.pictures] == ["confusion.png"]


def test_heads_start_as_torchs_linear_layer_and_a_plain_one_has_no_batch_norm() -> None:
    torch.manual_seed(0)
    theirs = torch.nn.Linear(400, 50)
    head = build_head(HeadKey("res4", 0.1), 400, (2, 1), 50, seed=0)
    plain = build_head(HeadKey("avgpool_plain", 0.1), 400, (1, 1), 50, seed=0)
    for made in (head, plain):
        for ours, default in zip(made.linear.parameters(), theirs.parameters(), strict=True):
            largest = default.abs().max().item()  # 1 / sqrt(400), or slightly less
            assert ours.abs().max().item() == pytest.approx(largest, rel=0.1)
            spread = default.std().item()
            assert ours.std().item() == pytest.approx(spread, rel=0.02 if ours.dim() > 1 else 0.3)
    vectors = torch.randn(6, 400, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.linear(vectors, plain.linear.weight, plain.linear.bias)
    torch.testing.assert_close(plain.train()(vectors), expected)
    halves = vectors.view(6, 200, 2)
    mean, variance = halves.mean((0, 2)), halves.var((0, 2), unbiased=False)
    normal = (halves - mean[:, None]) / (variance[:, None] + 1e-5).sqrt()
    expected = torch.nn.functional.linear(normal.flatten(1), head.linear.weight, head.linear.bias)
    torch.testing.assert_close(head.train()(vectors), expected)


def test_plain_heads_and_cells_are_as_asked(few_shapes: Path, tmp_path: Path) -> None:
    names = ["res3_1x2", "avgpool", "avgpool_plain"]
    options = linear.Options(size=SIZE, epochs=1, batch=32, maps=names, augment=False)
    result = linear.run(context(few_shapes, tmp_path), options)
    assert [row["map"] for row in result.details["heads"]] == names
    assert {f"top1_{name}" for name in names} < result.metrics.keys()


def test_what_cannot_be_is_said(few_shapes: Path, tmp_path: Path) -> None:
    own = context(few_shapes, tmp_path)
    with pytest.raises(
        ConfigError, match=r"solver=lbfgs needs the same features.*add augment=false"
    ):
        linear.run(own, linear.Options(solver="lbfgs"))
    with pytest.raises(ConfigError, match="maps has res9, but this trunk has"):
        linear.run(own, linear.Options(maps=["res9"]))
