"""The first use of this rank's GPU, and what is wrong with it as one warning."""

from __future__ import annotations

import torch

from seer_scale.distributed import local_rank
from seer_scale.distributed.gpus import unused_gpus
from seer_scale.performance.cuda_allocator import undo_if_unsupported


def start_gpu() -> str | None:
    """Uses this rank's GPU, if there is one, for the first time.

    Returns:
        On the first rank of a node a warning, if torch cannot use the GPUs or their driver cannot
        extend segments of memory; else None.
    """
    reason = unused_gpus()
    if reason is None and torch.cuda.is_available():
        reason = undo_if_unsupported(local_rank())
    return reason if local_rank() == 0 else None
