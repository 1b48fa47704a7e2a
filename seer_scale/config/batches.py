"""How a run's images are shared out: to steps, to micro-batches, to ranks.

A recipe says how many images are trained and how many make a step. How they are shared out follows
from the number of ranks, here and nowhere else: training, planner, studies and doctor call
`resolve_batches` through `recipe.parse`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seer_scale.errors import ConfigError

if TYPE_CHECKING:
    from seer_scale.config.training_sections import TrainSection

# Small micro-batches are slow, and give BatchNorm and SwAV's codes few images. None smaller than a
# quarter of the largest is taken for the sake of a global batch, and where none makes it exactly,
# the largest that comes within a hundredth.
LEAST_PART = 4
CLOSE_PART = 100
MOST_TRIED = 10_000


@dataclass(frozen=True)
class Batches:
    """The numbers of `train.*` that say how many images are trained, all resolved.

    Attributes:
        micro_batch: images per rank and forward pass.
        accumulation: micro-batches of a rank per step.
        global_batch: images per step; micro_batch * accumulation * ranks.
        steps: optimizer steps of the run.
        images: images of the run; steps * global_batch, and at most a step more.
    """

    micro_batch: int
    accumulation: int
    global_batch: int
    steps: int
    images: int


def resolve_batches(
    train: Mapping[str, int | None], given: Collection[str], ranks: int, *, where: str = "recipe"
) -> Batches:
    """Works out the numbers that are not given.

    - Neither micro-batch nor accumulation on the command line: the global batch is kept, exactly
      where the ranks allow it and nearly elsewhere; the micro-batch is the largest that does so, up
      to that of the recipe.
    - One or both of them on the command line: they stay as they are, and the global batch follows
      from them, unless it is on the command line too.
    - `steps` wins over `images`, except over `images` on the command line.

    Args:
        train: `images`, `global_batch`, `steps`, `micro_batch_size` and `gradient_accumulation`;
            the command line's value, or else the recipe's, or None.
        given: names of those that the command line gives.
        ranks: processes of the run.
        where: the recipe, for the sentence about a missing number.

    Raises:
        ConfigError: numbers of the command line contradict each other, or too few are given.
    """
    micro, accumulation = _share(train, given, ranks, where)
    batch = micro * accumulation * ranks
    wanted = train["global_batch"]
    if wanted != batch and "global_batch" in given and _own(given):
        named = " and ".join(f"train.{name}={train[name]}" for name in _own(given))
        raise ConfigError(
            f"train.global_batch is {wanted:,}, but {named} cannot make it on {in_ranks(ranks)} "
            f"({batch:,} would be nearest): leave out one of them"
        )
    return Batches(micro, accumulation, batch, *_length(train, given, batch, where))


def in_words(train: TrainSection, ranks: int) -> str:
    """Says what a configuration's section `train` comes to on a number of ranks."""
    return (
        f"{train.images:,} images: {train.steps:,} steps of {train.global_batch:,} = "
        f"{in_factors(train.micro_batch_size, ranks, train.gradient_accumulation)}"
    )


def in_factors(micro_batch: int, ranks: int, accumulation: int) -> str:
    """Writes a global batch as its factors."""
    return f"{in_images(micro_batch)} x {in_ranks(ranks)} x {in_micro_batches(accumulation)}"


def in_images(count: int) -> str:
    """Writes a number of images."""
    return f"{count:,} image{'' if count == 1 else 's'}"


def in_micro_batches(count: int) -> str:
    """Writes a number of micro-batches."""
    return f"{count:,} micro-batch{'' if count == 1 else 'es'}"


def batch_note(
    train: Mapping[str, int | None], given: Collection[str], ranks: int, batches: Batches
) -> str | None:
    """Says in one line that the global batch is not the recipe's, and what would make it so."""
    wanted, batch = train["global_batch"], batches.global_batch
    if wanted is None or wanted == batch:
        return None
    made = in_factors(batches.micro_batch, ranks, batches.accumulation)
    if _own(given):
        return (
            f"train.global_batch is {batch:,} ({made}), where the recipe has {wanted:,}: add "
            f"train.global_batch={wanted} to keep it"
        )
    return (
        f"train.global_batch is {batch:,} ({made}), because this number of ranks cannot share "
        f"{wanted:,} images equally: a number of ranks that divides {wanted:,} can"
    )


def _own(given: Collection[str]) -> list[str]:
    """Those of the two factors of a rank's step that the command line gives."""
    return [name for name in ("micro_batch_size", "gradient_accumulation") if name in given]


def _share(
    train: Mapping[str, int | None], given: Collection[str], ranks: int, where: str
) -> tuple[int, int]:
    """The micro-batch, and the micro-batches of a rank per step."""
    batch, micro = train["global_batch"], train["micro_batch_size"]
    accumulation, own = train["gradient_accumulation"], _own(given)
    if batch is None or (own and "global_batch" not in given):
        if micro is None:
            raise ConfigError(
                f"{where} lacks train.global_batch or train.micro_batch_size: images per step, or "
                "per rank and forward pass (an integer > 0)"
            )
        return micro, accumulation or 1
    if micro is not None and "micro_batch_size" in own:
        if accumulation is not None and "gradient_accumulation" in own:
            return micro, accumulation
        return micro, _passes(batch, micro * ranks)
    if accumulation is not None and own:
        return _passes(batch, accumulation * ranks), accumulation
    if micro is None:
        return _passes(batch, ranks), 1
    largest = min(micro, math.ceil(batch / ranks))
    tried = range(max(math.ceil(largest / LEAST_PART), largest - MOST_TRIED), largest + 1)

    def miss(size: int) -> int:
        return abs(size * _passes(batch, size * ranks) * ranks - batch)

    near = [size for size in tried if miss(size) == 0]
    near = near or [size for size in tried if CLOSE_PART * miss(size) <= batch]
    best = max(near) if near else min(reversed(tried), key=miss)
    return best, _passes(batch, best * ranks)


def _passes(batch: int, images: int) -> int:
    """How often `images` come nearest to `batch`, at least once."""
    return max(1, round(batch / images))


def _length(
    train: Mapping[str, int | None], given: Collection[str], batch: int, where: str
) -> tuple[int, int]:
    """Steps and images of the run."""
    steps, images = train["steps"], train["images"]
    follow = None if images is None else max(1, images // batch)
    if steps is None or ("images" in given and "steps" not in given):
        if images is None or follow is None:
            raise ConfigError(
                f"{where} lacks train.images or train.steps: images or optimizer steps of the "
                "whole run (an integer > 0)"
            )
        return follow, images
    if steps != follow and {"steps", "images"} <= set(given):
        raise ConfigError(
            f"train.steps is {steps:,} and train.images is {images:,}, but steps of {batch:,} "
            f"images make {follow:,} of them: leave out one of both"
        )
    return steps, images if images is not None and steps == follow else steps * batch


def in_ranks(count: int) -> str:
    """Writes a number of ranks in words."""
    return "1 rank" if count == 1 else f"{count:,} ranks"
