"""Python's garbage collector under control: between steps, on all ranks after the same one.

Left to itself it stops each rank at another moment of a step, and all others wait for that rank.
What exists when the training begins is not looked at again, which is most of it.
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """Switches the automatic collection off; `close` switches it on again.

    Args:
        every: steps between two collections.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        gc.collect()
        gc.freeze()
        gc.disable()

    def after(self, step: int) -> None:
        """Call after every step; collects if it is time to."""
        if step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """Leaves the collector to itself."""
        gc.unfreeze()
        gc.enable()
