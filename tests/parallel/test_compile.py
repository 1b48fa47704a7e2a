"""`train.compile`: without a compiler a sentence, with one the same training."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from harness.jobs import arguments, losses, run_job, write_images
from seer_scale import distributed
from seer_scale.errors import ConfigError
from seer_scale.parallel.compile import check_compiler


def test_without_a_compiler_it_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import config, cpp_builder

    monkeypatch.setattr(config.cpp, "cxx", (str(tmp_path / "no-compiler"),))
    cpp_builder.cpp_compiler_search.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"no C\+\+ compiler.*train\.compile=false"):
            check_compiler(torch.device("cpu"))
    finally:
        cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_a_compiled_run_has_the_losses_of_any_other(tmp_path: Path) -> None:
    images = write_images(tmp_path / "images")
    found = []
    try:
        for compiled in ("false", "true"):
            run = tmp_path / compiled
            options = (f"train.compile={compiled}", "train.steps=3")
            assert run_job(arguments(images, run, *options)) == 3
            found.append(losses(run))
    finally:
        distributed.shutdown()  # of this process, where other tests follow
    assert found[1] == pytest.approx(found[0], rel=1e-4)
