"""Checks optional parts: Apex, FairScale, and compilers for kernels that are built on first use."""

from __future__ import annotations

import re
import shutil
import subprocess

from seer_scale.doctor.finding import Finding


def check_extras() -> list[Finding]:
    """Checks Apex, FairScale, and the needs of torch.compile and DeepSpeed's ops; imports torch."""
    import torch

    from seer_scale.parallel import apex, fairscale

    cuda = torch.cuda.is_available()
    return [
        _optional("apex amp", apex.missing_amp(cuda=cuda), "train.precision=apex-o1", "amp-o1"),
        _optional("apex syncbn", apex.missing_syncbn(cuda=cuda), "sharding.syncbn=apex", "native"),
        _optional("fairscale", fairscale.missing(cuda=cuda), "sharding.strategy=fairscale", "fsdp"),
        *check_compilers(torch.version.cuda),
    ]


def check_compilers(cuda: str | None) -> list[Finding]:
    """Checks the compilers on PATH.

    Args:
        cuda: version that torch is built for; None without CUDA.
    """
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    found = [
        Finding(
            "C++ compiler",
            "ok" if compiler else "warn",
            compiler or "none",
            "torch.compile and DeepSpeed's offload (CPU, NVMe) build code when first used",
            "" if compiler else "apt-get install g++, or do without offload and torch.compile",
        )
    ]
    if cuda is None:
        return found
    nvcc = _nvcc_version()
    same = nvcc is not None and nvcc.split(".")[0] == cuda.split(".")[0]
    found.append(
        Finding(
            "nvcc",
            "ok" if same else "warn",
            f"{nvcc or 'none'}; torch is built for {cuda}",
            "only Apex and DeepSpeed's own CUDA kernels are built with it",
            "" if same else f"install the CUDA {cuda.split('.')[0]} toolkit if you need those",
        )
    )
    return found


def _optional(name: str, missing: str | None, what: str, instead: str) -> Finding:
    if missing is None:
        return Finding(name, "ok", "installed", f"{what} works")
    return Finding(name, "ok", "no", f"{missing}; only {what} needs it, {instead} is its successor")


def _nvcc_version() -> str | None:
    if shutil.which("nvcc") is None:
        return None
    try:
        done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    return release[1] if release else None
