"""The estimate of RG-10B on one GPU, its choice of momentum, and its configuration."""

from __future__ import annotations

import math
import sys
from functools import cache

import pytest
import torch

from benchmarks import gpu_10b
from benchmarks.gpu_10b import (
    Estimate,
    build_engine,
    configuration,
    estimate,
    objective_of,
    run,
    take_step,
)
from seer_scale.config import RunConfig
from seer_scale.parallel.live_bytes import LiveBytes
from seer_scale.train.build_engine import check_run

CPU = torch.device("cpu")


def small(**more: str) -> RunConfig:
    """The same training with a small trunk, small crops and four equal layers of 4 MiB."""
    return configuration(
        "regnety_debug",
        2,
        model__head_dims="[1024, 1024, 1024, 1024, 1024, 32]",
        model__prototypes="50",
        data__crop_sizes="[64, 32]",
        **more,
    )


LAYER = 4 * 1024**2


@pytest.mark.parametrize("on_host", ["false", "true"])
def test_the_configuration_is_one_that_a_gpu_takes(on_host: str) -> None:
    config = configuration("rg_10b", 16, optim__momentum_on_host=on_host)
    check_run(config, None, world_size=1, local_world_size=1, cuda=True)
    assert config.data.crop_sizes == (160, 96)
    assert config.data.crop_counts == (2, 4)
    assert config.optim.fuse_backward
    assert config.train.precision == "bf16"


@cache
def estimated(**more: str) -> Estimate:
    return estimate(small(**more))


@pytest.mark.slow
def test_the_estimate_is_what_a_run_takes() -> None:
    config = small()
    with LiveBytes() as live:
        run(config, CPU, 2)
    found = estimated()
    assert found.on_device == pytest.approx(live.peak(), rel=1e-3)
    model = build_engine(config, CPU).model
    assert found.momentum == 4 * sum(p.numel() for p in model.parameters())
    assert found.weights == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


@pytest.mark.slow
def test_with_the_momentum_on_the_host_one_tensor_of_it_is_on_the_device() -> None:
    found, prototypes = estimated(), 4 * 50 * 32  # frozen, so they have none yet
    assert found.on_device - found.on_host == found.momentum - prototypes - LAYER


@pytest.mark.slow
def test_gradients_are_never_there_together() -> None:
    # Not the whole 4 layers: with the optimizer in the backward pass activations are there too.
    after = estimated(optim__fuse_backward="false")
    assert after.on_device - estimated().on_device > LAYER


@pytest.mark.parametrize("fused", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_a_gradient_is_freed_when_it_is_complete(fused: str) -> None:
    config = small(optim__fuse_backward=fused)
    engine = build_engine(config, CPU)
    parameters = list(engine.model.parameters())
    counts: list[int] = []

    def count(_: torch.Tensor) -> None:
        counts.append(sum(p.grad is not None for p in parameters))

    for parameter in parameters:
        # After the engine's own.
        parameter.register_post_accumulate_grad_hook(count)
    crops = gpu_10b.noise(config, 0, CPU)
    take_step(engine, objective_of(config), config, 0, crops)
    assert len(counts) == len(parameters)
    assert max(counts) == (0 if fused == "true" else len(parameters))


@pytest.mark.slow
def test_steps_are_those_of_an_optimizer_after_the_backward_pass() -> None:
    fused, _ = run(small(), CPU, 3)
    after, _ = run(small(optim__fuse_backward="false"), CPU, 3)
    assert [step.loss for step in fused] == [step.loss for step in after]
    assert len({step.loss for step in fused}) == 3
    assert all(math.isfinite(step.loss) and step.grad_norm > 0 for step in fused)


@pytest.mark.parametrize(
    ("gpu", "host", "expected"),
    [
        (139.8, 32.0, False),  # H200
        (79.1, 128.0, True),  # H100, A100 with 80 GB
        (79.1, 32.0, None),
        (39.4, 512.0, None),
    ],
)
def test_where_the_momentum_goes(gpu: float, host: float, expected: bool | None) -> None:
    assert gpu_10b.momentum_on_host(gpu, host) is expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU is told")
def test_without_a_gpu_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_10b.py"])
    assert gpu_10b.main() == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("no CUDA GPU here, nothing was run: RG-10B needs a CUDA GPU of 130 GiB")
