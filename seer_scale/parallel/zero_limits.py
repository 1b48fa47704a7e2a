"""The limits of DeepSpeed's stage 3 on gathered weights that `"auto"` stands for.

A layer is freed after its use unless it is used again within `stage3_max_reuse_distance` elements.
A recomputed block goes on with its backward pass, layers in reverse: it comes to its first layer
after all other layers once forward, and once backward for each resolution. With a distance below
that, the block would be gathered again for the backward pass.
"""

from __future__ import annotations

from typing import Any

REUSE, LIVE, PREFETCH = (
    "stage3_max_reuse_distance",
    "stage3_max_live_parameters",
    "stage3_prefetch_bucket_size",
)
DEFAULT_PREFETCH = 50_000_000  # DeepSpeed's
USES = (
    3  # of a block's layers before the first one's next: forward, and backward for two resolutions
)
LEAST = 200_000_000  # a smaller model stays whole, 0.8 GB, and is gathered once a step


def with_limits(zero: dict[str, Any], largest_block: int) -> dict[str, Any]:
    """Returns `zero` with numbers where its limits are `"auto"`, for stage 3.

    The reuse distance becomes `USES` times the largest block. The limit of live weights becomes the
    block and one bucket: DeepSpeed gathers nothing ahead of its use while more are live.

    Args:
        zero: the section zero_optimization.
        largest_block: parameters of the trunk's largest block.
    """
    if zero.get("stage") != 3:
        return zero
    prefetch = zero.get(PREFETCH, "auto")
    bucket = DEFAULT_PREFETCH if prefetch == "auto" else int(prefetch)
    numbers = {REUSE: max(LEAST, USES * largest_block), LIVE: max(LEAST, largest_block + bucket)}
    return zero | {key: number for key, number in numbers.items() if zero.get(key) == "auto"}
