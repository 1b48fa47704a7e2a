"""Hardware profiles are complete, may be one's own file, and refuse a precision they lack."""

from __future__ import annotations

from typing import Any

import pytest

from seer_scale.errors import ConfigError
from seer_scale.performance.hardware import FOLDER, load_hardware, names
from tests.planner.test_communication import machine

PROFILES = [
    *("a100_40gb", "a100_80gb", "b200_180gb", "cpu", "h100_80gb", "h200_141gb", "l40s_48gb"),
    *("mi300x_192gb", "rtx_4090_24gb", "v100_32gb"),
]


def test_the_profiles_there_are() -> None:
    assert names() == PROFILES
    for name in PROFILES:
        hardware = load_hardware(name)
        assert hardware.usable_gib > 0
        assert hardware.efficiency_source


def test_an_own_profile(tmp_path: Any) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text((FOLDER / "cpu.yaml").read_text())
    assert load_hardware(str(own)) == load_hardware("cpu")
    own.write_text("name: nothing\n")
    with pytest.raises(
        ConfigError, match=r"mine.yaml: generation is missing: it must be a non-empty string"
    ):
        load_hardware(str(own))


def test_measured_goes_before_nominal() -> None:
    assert machine().intra_node_gb_s.bytes_per_second == 10e9
    assert load_hardware("v100_32gb").intra_node_gb_s.bytes_per_second == 0.8 * 150e9
    peaks = {"nominal": {"fp32": 15, "amp-o1": 125}, "measured": {"fp32": 14, "amp-o1": 99}}
    assert machine(peak_tflops=peaks).peak("amp-o1") == 99e12
    assert machine(peak_tflops={**peaks, "measured": None}).peak("amp-o1") == 125e12


def test_volta_has_no_bfloat16() -> None:
    with pytest.raises(ConfigError, match="which NVIDIA V100 SXM2, 32 GB does not have: use fp32"):
        load_hardware("v100_32gb").peak("bf16")
    assert load_hardware("v100_32gb").peak("apex-o1") == 125e12
