"""Apex and FairScale on a machine without them: sentences, and what of the wiring runs here.

Where CUDA is, `make gpu-check` runs both in the parity matrix. test_fairscale.py runs one on a CPU.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from seer_scale.models import build_model, initialise
from seer_scale.optim.groups import parameter_groups
from seer_scale.parallel import apex, fairscale
from seer_scale.parallel.activation_checkpoint import apply_activation_checkpointing
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """`install({file: text})` puts packages first on the path, for this test."""
    ours = ("apex", "fairscale", "syncbn")

    def forget() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] in ours]

    for name in forget():
        monkeypatch.delitem(sys.modules, name)

    def write(files: dict[str, str]) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield write
    for name in forget():
        del sys.modules[name]


WITH_AMP = {
    "apex/__init__.py": "",
    "apex/amp.py": "import warnings; warnings.warn('going', FutureWarning); initialize = print",
}
WITH_PARALLEL = {
    "apex/__init__.py": "",
    "apex/parallel.py": "class SyncBatchNorm: ...",
}


@pytest.mark.parametrize(
    ("packages", "asked", "cuda", "expected"),
    [
        ({}, apex.missing_amp, False, "NVIDIA Apex needs a CUDA GPU and there is none"),
        (WITH_AMP, apex.missing_amp, False, "NVIDIA Apex needs a CUDA GPU"),
        ({"apex/__init__.py": ""}, apex.missing_amp, True, "installed apex has no apex.amp"),
        (
            {"apex/__init__.py": "import no_such_thing"},
            apex.missing_amp,
            True,
            "cannot be imported (No module named 'no_such_thing')",
        ),
        (
            {"apex/__init__.py": "raise ImportError('undefined symbol')"},
            apex.missing_amp,
            True,
            "cannot be imported (undefined symbol)",
        ),
        (WITH_AMP, apex.missing_amp, True, "None"),
        (WITH_AMP, apex.missing_syncbn, True, "installed apex has no apex.parallel"),
        (WITH_PARALLEL, apex.missing_syncbn, True, "without its CUDA extensions"),
        ({**WITH_PARALLEL, "syncbn.py": ""}, apex.missing_syncbn, True, "None"),
        ({}, fairscale.missing, False, "FairScale needs a CUDA GPU and there is none"),
        ({"fairscale/__init__.py": ""}, fairscale.missing, False, "needs a CUDA GPU"),
        ({"fairscale/__init__.py": ""}, fairscale.missing, True, "None"),
    ],
)
def test_what_is_missing_is_said(
    install: Callable[..., None],
    packages: dict[str, str],
    asked: Callable[..., str | None],
    cuda: bool,
    expected: str,
) -> None:
    install(packages)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        said = str(asked(cuda=cuda))
    assert expected in said
    assert expected != "None" or said == "None"


@pytest.mark.skipif(importlib.util.find_spec("apex") is not None, reason="Apex is installed")
def test_without_apex_the_tags_that_have_it_are_named() -> None:
    for asked, part in ((apex.missing_amp, "amp"), (apex.missing_syncbn, "parallel")):
        expected = f"NVIDIA Apex is not installed (its tags up to 25.05 have apex.{part})"
        assert asked(cuda=True) == expected


@pytest.mark.skipif(importlib.util.find_spec("fairscale") is not None, reason="it is installed")
def test_without_fairscale_its_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fairscale", None)  # as if it were not installed
    expected = "FairScale is not installed (pip install 'seer-scale[fairscale]')"
    assert fairscale.missing(cuda=True) == expected


def test_a_group_of_one_is_not_the_world() -> None:
    # Apex reads no group as all ranks.
    layer = apex.sync_batchnorm(3, None, eps=0.1, momentum=0.2, device="meta")
    assert isinstance(layer, GroupedSyncBatchNorm)
    assert (layer.eps, layer.momentum, layer.weight.is_meta) == (0.1, 0.2, True)


def states(model: nn.Module, handle: SimpleNamespace) -> dict[str, list[bool]]:
    """Whether Apex casts in each call of each layer, recomputed calls too."""
    seen: dict[str, list[bool]] = {}

    def note(name: str) -> Any:
        return lambda *_: seen.setdefault(name, []).append(handle._is_active)

    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(note(name))
    original = torch.nn.functional.linear

    def linear(*args: Any, **kwargs: Any) -> torch.Tensor:
        if isinstance(args[1], nn.Parameter):  # not squeeze-and-excitation's, noted above
            seen.setdefault("linear", []).append(handle._is_active)
        return original(*args, **kwargs)

    torch.nn.functional.linear = linear
    try:
        _, scores = model([torch.randn(2, 3, 64, 64), torch.randn(2, 3, 32, 32)])
        assert not handle._is_active  # loss and optimizer
        scores.square().sum().backward()
    finally:
        torch.nn.functional.linear = original
    return seen


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_o1_casts_in_the_forward_and_its_recomputation_only(
    monkeypatch: pytest.MonkeyPatch, recompute: str
) -> None:
    handle = SimpleNamespace(_is_active=False)
    monkeypatch.setattr(apex, "_o1", lambda: handle)
    model = build_model("regnety_debug", head_dims=[16, 8], head_batch_norm=False, prototypes=6)
    initialise(model, 0)
    apex.apply_o1(model)
    apply_activation_checkpointing(model.stages(), recompute)
    seen = states(model, handle)
    assert seen.pop("linear") == [True, True, False]  # two layers of the head, the prototypes
    blocks = [calls for name, calls in seen.items() if "trunk_output" in name]
    # Both resolutions in one call.
    assert all(calls == [True] * (2 if recompute == "full" else 1) for calls in blocks)
    assert all(all(calls) for calls in seen.values())
    assert not handle._is_active


def test_a_failing_forward_leaves_apex_off() -> None:
    handle = SimpleNamespace(_is_active=False)

    def fails() -> None:
        assert handle._is_active
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        apex._switched(fails, handle, on=True)()
    assert not handle._is_active


def test_names_and_shapes_are_the_models_under_fairscale() -> None:
    names = ["_fsdp_wrapped_module._fpw_module.head._fsdp_wrapped_module._fpw_module.mean", "x.y"]
    cleaned = fairscale._cleaned(lambda: [(name, torch.zeros(1)) for name in names])
    assert [name for name, _ in cleaned()] == ["head.mean", "x.y"]
    layer: Any = nn.Linear(3, 5)
    for parameter, shape in ((layer.weight, (5, 3)), (layer.bias, (5,))):
        parameter._orig_size = torch.Size(shape)
        parameter.data = torch.zeros(8)  # this rank's part, padded
    groups = parameter_groups(layer, unit_rows=frozenset())
    assert [group["shape"] for group in groups] == [(5, 3), (5,)]
