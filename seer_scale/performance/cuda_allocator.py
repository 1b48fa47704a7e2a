"""Settings of CUDA's memory allocator, made before torch reads them."""

from __future__ import annotations

import os

# torch reads either of these when CUDA is first used; the second is the older name.
VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
SETTING = "expandable_segments:True"


def let_segments_grow() -> None:
    """Lets the allocator extend its segments, so that tensors of changing sizes leave no gaps.

    Measured peaks of memory are those of this setting. What the user has set in either of
    `VARIABLES` stays as it is. It has no effect without CUDA; where the driver does not support it,
    torch warns and goes on.
    """
    if not any(name in os.environ for name in VARIABLES):
        os.environ[VARIABLES[0]] = SETTING
