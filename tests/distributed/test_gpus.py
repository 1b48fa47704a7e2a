"""GPUs that cannot be used. What torch answers on such machines is replaced, nothing else is."""

from __future__ import annotations

import warnings
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist

from seer_scale.distributed.gpus import backend_of, unused_gpus
from seer_scale.errors import ConfigError

# torch/csrc/cuda/Module.cpp of torch 2.14 raises this, and warns of it with a prefix.
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version"
)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (
            TOO_OLD,
            "(The NVIDIA driver on your system is too old (found version 11040)), so the CPU",
        ),
        (
            "Unexpected error from cudaGetDeviceCount(). Did you run\nsome cuda functions before",
            "(Unexpected error from cudaGetDeviceCount()), so the CPU computes everything",
        ),
        ("Found no NVIDIA driver on your system. Please check that you have a GPU", None),
        ("No CUDA GPUs are available", None),
    ],
)
def test_gpus_that_torch_cannot_use_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch, said: str, expected: str | None
) -> None:
    def available() -> bool:
        warnings.warn(f"CUDA initialization: {said}", UserWarning, stacklevel=2)
        return False

    def init() -> NoReturn:
        raise RuntimeError(said)

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", available)
    monkeypatch.setattr(torch.cuda, "init", init)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = unused_gpus()
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert expected in found
    assert found.endswith("install a torch that is made for it (this one: CUDA 13.0)")
    assert "\n" not in found


def test_a_torch_without_nccl_trains_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert backend_of(cuda=True, ranks=1) == "gloo"
    assert backend_of(cuda=False, ranks=8) == "gloo"
    with pytest.raises(ConfigError) as raised:
        backend_of(cuda=True, ranks=8)
    sentence = str(raised.value)
    assert "has no NCCL, by which 8 ranks with GPUs communicate: install " in sentence
    monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
    assert backend_of(cuda=True, ranks=8) == "nccl"
