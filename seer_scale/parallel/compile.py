"""torch.compile, block by block, with SyncBatchNorm's collectives inside of the graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.utils._triton import has_triton

from seer_scale.errors import ConfigError

GRAPHS_PER_BLOCK = 4  # at most: forward pass and recomputation, for two sizes of micro-batch


def apply_compile(blocks: Sequence[nn.Module], *, backend: str = "inductor") -> None:
    """Compiles the forward pass of every block, in place; blocks of equal shapes share their code.

    Call this before activation checkpointing, which has to stay around the compiled part.

    Args:
        blocks: the trunk's blocks; each takes all resolutions at once and becomes one graph.
        backend: backend of torch.compile.
    """
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, GRAPHS_PER_BLOCK * len(blocks))
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, dynamic=False, fullgraph=True)


def check_compiler(device: torch.device) -> None:
    """Refuses `train.compile` where torch has no compiler for the device.

    Raises:
        ConfigError: one sentence with the reason and what to do.
    """
    if device.type == "cuda":
        missing = None if has_triton() else "Triton is not installed or does not know this GPU"
    else:
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
            missing = None
        except InvalidCxxCompiler:
            missing = "no C++ compiler was found (CXX, g++, clang++)"
    if missing:
        raise ConfigError(
            f"train.compile is true, but {missing}: install one, or set train.compile=false, "
            "which computes the same"
        )
