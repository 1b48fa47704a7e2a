"""The extension that DeepSpeed compiles for NVMe: before it is needed, and not in silence."""

from __future__ import annotations

import time
from typing import Any

import pytest

from harness.engines import build_engine, configuration
from seer_scale.parallel.offload import uses_nvme


@pytest.mark.parametrize(("silent", "said"), [(0.1, True), (60.0, False)])
def test_a_long_compilation_is_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], silent: float, said: bool
) -> None:
    pytest.importorskip("deepspeed")
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from seer_scale.parallel import zero

    # Compiling takes minutes; test_nonfinite.py does it.
    monkeypatch.setattr(AsyncIOBuilder, "load", lambda self, verbose: time.sleep(1))
    monkeypatch.setattr(zero, "SILENT_SECONDS", silent)
    zero.compile_for_nvme()
    assert (zero.COMPILING in capsys.readouterr().err) is said


def test_a_training_compiles_before_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    from seer_scale.parallel import zero

    class CompiledError(Exception):
        pass

    def compiled() -> None:
        raise CompiledError

    monkeypatch.setattr(zero, "compile_for_nvme", compiled)
    monkeypatch.setattr(zero, "fill_partitioned", lambda *_: pytest.fail("built before"))
    with pytest.raises(CompiledError):
        build_engine(configuration("--deepspeed_config", "ds_configs/zero3_nvme.json"))


@pytest.mark.parametrize(
    ("zero", "expected"),
    [
        ({}, False),
        ({"offload_optimizer": {"device": "cpu"}}, False),
        ({"offload_optimizer": {"device": "nvme"}}, True),
        ({"offload_param": {"device": "nvme"}, "offload_optimizer": None}, True),
    ],
)
def test_a_step_on_a_disk_is_told(zero: dict[str, Any], expected: bool) -> None:
    assert uses_nvme(zero) is expected
