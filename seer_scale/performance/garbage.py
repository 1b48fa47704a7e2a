"""Runs Python's garbage collector between steps, on all ranks after the same step.

By itself the collector stops each rank at another moment, and all other ranks wait for that rank.
Objects that exist when the training begins, which are most objects, are not examined again.
"""

from __future__ import annotations

import gc


class GarbageCollection:
    """Switches automatic garbage collection off; `close` switches it on again.

    Args:
        every: steps between two collections.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        gc.collect()
        gc.freeze()
        gc.disable()

    def after(self, step: int) -> None:
        """Collects garbage after every `every` steps; to be called after each step."""
        if step % self._every == 0:
            gc.collect()

    def close(self) -> None:
        """Switches automatic garbage collection on again."""
        gc.unfreeze()
        gc.enable()
