"""MFU and HFU from operations counted by torch, seconds of the run, and a given or known peak."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.jobs import RECIPES, arguments, lines, run_job, write_images
from harness.pool import Distributed
from seer_scale.config.recipe import parse
from seer_scale.models.regnet import trunk_config
from seer_scale.performance import hardware
from seer_scale.performance.flops import STEM, trunk_layers
from seer_scale.performance.hardware import hardware_of, load_hardware
from seer_scale.train import build, build_reports

CPU = torch.device("cpu")


def utilisation(*overrides: str) -> tuple[Any, list[str]]:
    config = parse(arguments("nowhere", "run", *overrides), recipes=RECIPES, ranks=1).config
    said: list[str] = []
    return build.utilisation_of(config, CPU, None, said.append), said


def test_model_operations_are_those_that_torch_counts() -> None:
    found, said = utilisation("run.peak_tflops=2.0")
    assert (found.peak, said) == (2e12, [])
    config = parse(arguments("nowhere", "run"), recipes=RECIPES, ranks=1).config
    model = build.model_of(config, CPU).train()
    for parameter in model.parameters():
        torch.nn.init.ones_(parameter)
    images = 2
    with FlopCounterMode(display=False) as counter:
        _, scores = model([torch.ones(2 * images, 3, 32, 32)])
        forward = counter.get_total_flops()
        scores.sum().backward()
    # Of the backward pass torch's counter is right where nothing is grouped: see test_flops.
    stem = trunk_layers(trunk_config(config.model.trunk), 32)[0].forward
    assert found.model_flops == 3 * forward / images - 2 * stem
    assert found.hardware_flops == found.model_flops


def test_recomputation_is_in_hfu_only() -> None:
    plain, _ = utilisation("run.peak_tflops=1.0")
    full, _ = utilisation("run.peak_tflops=1.0", "sharding.activation_checkpointing=full")
    layers = trunk_layers(trunk_config("regnety_debug"), 32)
    blocks = 2 * sum(layer.forward for layer in layers if layer.block != STEM)  # two crops
    assert full.model_flops == plain.model_flops
    assert full.hardware_flops == plain.hardware_flops + blocks
    metrics = full.metrics(5.0)
    assert metrics == {
        "mfu": pytest.approx(5.0 * full.model_flops / 1e12),
        "hfu": pytest.approx(5.0 * full.hardware_flops / 1e12),
    }
    groups = ("sharding.activation_checkpointing=groups", "sharding.checkpoint_groups=[[],[1],[]]")
    some, _ = utilisation("run.peak_tflops=1.0", *groups)
    assert plain.hardware_flops < some.hardware_flops < full.hardware_flops


@pytest.mark.parametrize(
    ("device", "precision", "profile"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", "h100_80gb"),
        ("NVIDIA A100-SXM4-40GB", "amp-o1", "a100_40gb"),
        ("Tesla V100-SXM2-32GB", "amp-o1", "v100_32gb"),
        ("NVIDIA H200", "fp32", "h200_141gb"),
    ],
)
def test_the_peak_is_that_of_the_device_s_profile(
    monkeypatch: pytest.MonkeyPatch, device: str, precision: str, profile: str
) -> None:
    monkeypatch.setattr(build_reports, "device_name", lambda _: device)
    found = hardware_of(device)
    assert found == load_hardware(profile)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # a CPU's profile is of a core
    given, said = utilisation(f"train.precision={precision}")
    assert given.peak == load_hardware(profile).peak(precision)
    assert said == []


def test_an_unknown_peak_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_reports, "device_name", lambda _: "Abacus 3000")
    found, said = utilisation()
    assert found is None
    assert said == [
        "no mfu: the peak of Abacus 3000 in train.precision=fp32 is not known; run.peak_tflops "
        "sets it"
    ]
    monkeypatch.setattr(build_reports, "device_name", lambda _: "Tesla V100-SXM2-32GB")
    assert utilisation("train.precision=bf16")[0] is None  # which it only emulates
    assert utilisation("run.peak_tflops=0.5")[0].peak == 0.5e12


def test_no_device_is_in_two_profiles() -> None:
    devices = [load_hardware(name).device_names for name in hardware.names()]
    assert all(devices)
    flat = list(itertools.chain(*devices))
    assert len(flat) == len(set(flat))


def test_a_run_s_metrics(distributed: Distributed, tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    argv = ("run.peak_tflops=0.25", "sharding.activation_checkpointing=full", "train.steps=2")
    distributed(run_job, 2, arguments(images, tmp_path / "run", *argv))
    found, _ = utilisation(*argv)
    for line in lines(tmp_path / "run"):
        of_a_rank = line["images_per_second"] / 2
        assert line["mfu"] == pytest.approx(of_a_rank * found.model_flops / 0.25e12)
        assert line["hfu"] == pytest.approx(of_a_rank * found.hardware_flops / 0.25e12)
