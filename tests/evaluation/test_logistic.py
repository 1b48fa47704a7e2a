"""Logistic regression on standardised features against scikit-learn, on few examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from seer_scale.errors import ConfigError
from seer_scale.evaluation import logistic
from seer_scale.evaluation.logistic import (
    bytes_needed,
    check_logistic,
    predict_logistic,
    standardise,
)
from seer_scale.evaluation.options import LinearOptions, LowshotOptions
from seer_scale.evaluation.tasks import linear, lowshot
from tests.evaluation.contexts import context

PEAK = """
import sys, torch
from seer_scale.evaluation.logistic import predict_logistic
torch.manual_seed(0)
train, val, width, classes = map(int, sys.argv[1:])
def fit(train, val, width, classes):
    parts = [torch.randn(n, width, dtype=torch.float64) for n in (train, val)]
    predict_logistic(parts[0], torch.randint(classes, (train,)), parts[1], classes, 1e-9)
def read(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))
fit(20, 5, 3, 2)  # what is imported and kept at the first use
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts afresh
before = read("VmHWM")
fit(train, val, width, classes)
print(read("VmHWM") - before)
"""


def test_columns_are_standardised_as_by_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    train = 3 + 5 * torch.randn(7, 4, generator=generator)
    train[:, 3] = 2.0  # a column that says nothing
    other = torch.randn(5, 4, generator=generator)
    other[:, 3] = 2.0
    scaler = StandardScaler().fit(train.double().numpy())
    for found, part in zip(standardise(train, other), (train, other), strict=True):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(found.numpy(), scaler.transform(part.double().numpy()))


@pytest.mark.parametrize("decay", [1e-2, 1.0])
def test_logits_of_few_examples_are_scikit_learns(decay: float) -> None:
    generator = torch.Generator().manual_seed(1)
    train, val = (4 + 3 * torch.randn(n, 5, generator=generator) for n in (12, 30))
    targets = torch.arange(12) % 3
    scaler = StandardScaler().fit(train.double().numpy())
    model = LogisticRegression(C=1 / (decay * 12), max_iter=5000, tol=1e-10)
    model.fit(scaler.transform(train.double().numpy()), targets)
    theirs = torch.tensor(model.decision_function(scaler.transform(val.double().numpy())))
    ours = predict_logistic(train, targets, val, 3, decay)
    # Both stop where the gradient is 1e-6 or less.
    torch.testing.assert_close(ours.log_softmax(1), theirs.log_softmax(1), rtol=0, atol=1e-4)


def test_what_is_64_bits_wide_is_standardised_without_a_copy() -> None:
    train, val = torch.randn(6, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    found = standardise(train, val)
    assert [part.data_ptr() for part in found] == [train.data_ptr(), val.data_ptr()]


@pytest.mark.long
@pytest.mark.parametrize("shape", [(20000, 2000, 400, 20), (2000, 200, 200, 500)])
def test_the_memory_that_is_counted_is_what_it_takes(shape: tuple[int, int, int, int]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *map(str, shape)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    # A search on a line keeps up to 12 vectors, and fewer if its first step is good enough, which
    # the last bits of a processor's products decide: 0.78 to 0.87 for the second shape.
    assert 0.7 < int(done.stdout) / bytes_needed(*shape) < 1.1


def test_what_does_not_fit_is_refused_with_the_numbers(
    few_shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before features are computed."""
    assert bytes_needed(1_281_167, 50_000, 10_444, 1000) > 8 * 1_281_167 * 10_444 > 107e9
    check_logistic(1000, 100, 100, 10, "use less")
    sentence = (
        r"logistic regression on 1000000000 images of 10444 features and 1000 classes takes "
        r"1\d{5}\.\d GB of memory on this machine \(1 ranks\), but \d+\.\d GB are free: use less"
    )
    with pytest.raises(ConfigError, match=sentence):
        check_logistic(1_000_000_000, 100, 10_444, 1000, "use less")
    monkeypatch.setattr(logistic, "free_memory", lambda: 1000)
    own = context(few_shapes, tmp_path)
    with pytest.raises(ConfigError, match=r"use solver=sgd or maps=\[avgpool\], or take"):
        linear.run(own, LinearOptions(solver="lbfgs", augment=False, size=32))
    with pytest.raises(ConfigError, match="use smaller splits, map=avgpool or method=finetune"):
        lowshot.run(own, LowshotOptions(size=32))
    assert not (tmp_path / "features").exists()
