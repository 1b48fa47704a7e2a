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


def test_without_a_compiler_it_is_refused(tmp_path: Path) -> None:
    from torch._inductor import config, cpp_builder

    cpp_builder.cpp_compiler_search.cache_clear()
    # Not by monkeypatch, which leaves the setting hidden.
    with (
        config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}),
        pytest.raises(ConfigError, match=r"no C\+\+ compiler.*train\.compile=false"),
    ):
        check_compiler(torch.device("cpu"))
    cpp_builder.cpp_compiler_search.cache_clear()


@pytest.mark.long
# Dynamo asks the inputs of a graph for their gradients.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
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
