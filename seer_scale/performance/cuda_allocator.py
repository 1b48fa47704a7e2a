"""Settings of CUDA's memory allocator: made before torch reads them, undone where they fail."""

from __future__ import annotations

import os

# torch reads either of these when CUDA is first used; the second is the older name.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SETTING, FIXED = "expandable_segments:True", "expandable_segments:False"


def let_segments_grow() -> None:
    """Lets the allocator extend its segments, so that tensors of changing sizes leave no gaps.

    Measured peaks of memory are those of this setting. What the user has set in either of
    `VARIABLES` stays as it is. It has no effect without CUDA; `undo_if_unsupported` says what
    happens where the driver cannot do it.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = SETTING


def undo_if_unsupported(gpu: int) -> str | None:
    """Allocates a first tensor; where the driver cannot extend segments, fixes their size again.

    Virtual GPUs and some containers refuse the calls of the driver that it takes, and the first
    allocation of a training would end it. What the user has set stays as it is, and fails as it
    would anywhere.

    Args:
        gpu: number of this rank's GPU.

    Returns:
        A warning if segments had to be fixed, else None.
    """
    import torch  # after `let_segments_grow`

    if os.environ.get(VARIABLES[0]) != SETTING:
        return None
    try:
        torch.empty(1, device=torch.device("cuda", gpu))
    except torch.OutOfMemoryError:
        return None  # another program has the memory: the run says so where it needs more
    except RuntimeError as error:
        torch._C._accelerator_setAllocatorSettings(FIXED)
        torch.empty(1, device=torch.device("cuda", gpu))  # raises what has another reason
        said = str(error).split("\n")[0].removesuffix(".")
        return (
            f"the driver of GPU {gpu} cannot extend segments of memory ({said}), so the run goes "
            "on without: gaps between tensors may take memory that no plan counts; set "
            f"{VARIABLES[0]}={FIXED} to leave the attempt out"
        )
    return None
