"""GPUs that are there and cannot be used, and the backend of process groups that follows."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist

from seer_scale.errors import ConfigError


def unused_gpus() -> str | None:
    """Says why torch cannot use this machine's GPUs: a driver too old, or broken.

    None if it uses them, if there is no driver, if GPUs are hidden on purpose
    (CUDA_VISIBLE_DEVICES), or if this torch is made for CPUs.
    """
    with warnings.catch_warnings():
        # torch says the same in three lines, once.
        warnings.filterwarnings("ignore", "CUDA initialization")
        if torch.cuda.is_available() or torch.version.cuda is None:
            return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        said = str(error).split("\n")[0].split(". ")[0].removesuffix(".")
        if "Found no NVIDIA driver" in said or "No CUDA GPUs are available" in said:
            return None
        return (
            f"torch cannot use this machine's GPUs ({said}), so the CPU computes everything: "
            f"update the driver, or install a torch that is made for it (this one: CUDA "
            f"{torch.version.cuda})"
        )
    return None


def backend_of(*, cuda: bool, ranks: int) -> str:
    """Returns the backend of process groups: nccl for GPUs, gloo for CPUs, and for a GPU alone.

    Raises:
        ConfigError: several ranks have GPUs, and this build of torch has no NCCL.
    """
    if not cuda:
        return "gloo"
    if dist.is_nccl_available():
        return "nccl"
    if ranks == 1:
        return "gloo"
    raise ConfigError(
        f"this build of torch ({torch.__version__}) has no NCCL, by which {ranks} ranks with GPUs "
        "communicate: install torch's own wheel for Linux, train with one rank, or set "
        "CUDA_VISIBLE_DEVICES= to train on CPUs"
    )
