"""Fills in what a recipe leaves to the number of ranks, and says what cannot be kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from seer_scale.config.batches import batch_note, in_ranks, resolve_batches
from seer_scale.config.run_config import RunConfig
from seer_scale.errors import ConfigError

Values = dict[str, dict[str, Any]]
BATCHES = ("images", "global_batch", "steps", "micro_batch_size", "gradient_accumulation")
# Keys in steps -> the key that states the same as a share of the run.
SHARES = {
    "optim.warmup_steps": "optim.warmup_share",
    "optim.freeze_prototypes_steps": "optim.freeze_prototypes_share",
}


def drop_replaced(values: Values, overrides: Collection[str]) -> None:
    """Drops from a recipe's values what an override states in another unit."""
    for pair in SHARES.items():
        for key, other in (pair, pair[::-1]):
            if key in overrides:
                section, name = other.split(".")
                values[section].pop(name, None)


def check_pairs(values: Values, sources: Mapping[str, str]) -> None:
    """Refuses a length that is stated in steps and as a share.

    Args:
        values: section -> key -> value.
        sources: for each key that a file gave, the file's name and a colon.

    Raises:
        ConfigError: names both keys.
    """
    for key, other in SHARES.items():
        (section, steps), share = key.split("."), other.split(".")[1]
        if steps in values[section] and values[section].get(share) is not None:
            raise ConfigError(
                f"{sources.get(key, '')}{key} is {values[section][steps]} and {other} is "
                f"{values[section][share]}, but both state the same length: leave out one of them"
            )


def complete(
    config: RunConfig, given: Collection[str], ranks: int, *, where: str
) -> tuple[Values, tuple[str, ...]]:
    """Computes the numbers that follow from the number of ranks.

    Args:
        config: a configuration that is valid, but may lack the numbers of `BATCHES`.
        given: the keys that the command line gives, such as `train.steps`.
        ranks: processes of the run.
        where: the recipe, for the sentence about a missing number.

    Returns:
        section -> key -> value, to be put into the configuration; and what cannot be kept of the
        recipe, one line each.

    Raises:
        ConfigError: as `resolve_batches` does.
    """
    train = {name: getattr(config.train, name) for name in BATCHES}
    named = [key.removeprefix("train.") for key in given if key.startswith("train.")]
    batches = resolve_batches(train, named, ranks, where=where)
    values: Values = {
        "train": {
            "images": batches.images,
            "global_batch": batches.global_batch,
            "steps": batches.steps,
            "micro_batch_size": batches.micro_batch,
            "gradient_accumulation": batches.accumulation,
        },
        "optim": {},
        "sharding": {},
    }
    for key, other in SHARES.items():
        name, share = key.split(".")[1], other.split(".")[1]
        part = getattr(config.optim, share)
        if part is not None:
            values["optim"] |= {name: round(part * batches.steps), share: None}
    notes = [batch_note(train, named, ranks, batches)]
    size = config.sharding.sync_bn_group_size
    if size > 0 and ranks % size and "sharding.sync_bn_group_size" not in given:
        own = max(divisors(ranks, up_to=size))
        values["sharding"]["sync_bn_group_size"] = own
        notes.append(
            f"sharding.sync_bn_group_size is {own}, where the recipe has {size}, which does not "
            f"divide {in_ranks(ranks)}: BatchNorm sees {own * batches.micro_batch:,} images at a "
            "time, and more with a larger train.micro_batch_size"
        )
    per_pass = batches.micro_batch * ranks
    swav = config.objective.name == "swav" and not config.objective.options.get("queue_length")
    if swav and per_pass < batches.global_batch:
        notes.append(
            f"SwAV balances its codes over the {per_pass:,} images of a micro-batch of all ranks, "
            f"not over the {batches.global_batch:,} of a step: objective.queue_length="
            f"{batches.global_batch - per_pass} adds those of earlier micro-batches"
        )
    return values, tuple(note for note in notes if note)


def divisors(number: int, *, up_to: int) -> list[int]:
    """Lists the divisors of `number`, none above `up_to`."""
    return [size for size in range(1, min(number, up_to) + 1) if number % size == 0]


def divisors_of(ranks: int) -> str:
    """Writes the sizes of BatchNorm groups that divide the ranks: `1, 2, 4 or 8`."""
    *firsts, last = map(str, divisors(ranks, up_to=64))
    return f"{', '.join(firsts)} or {last}" if firsts else last


def numbers_of_older_run(saved: Mapping[str, Any]) -> Values:
    """Returns the numbers of a checkpoint's configuration that a recipe did not leave open then.

    Before `train.global_batch` a recipe fixed steps and images per rank, and a run that was started
    so goes on with them.

    Args:
        saved: configuration in a checkpoint.

    Returns:
        section -> key -> value; nothing for the configuration of a newer run.
    """
    train, optim = saved.get("train", {}), saved.get("optim", {})
    if "steps" not in train or "global_batch" in train:
        return {}
    schedule = [key.split(".")[1] for key in SHARES]
    return {
        "train": {name: train[name] for name in BATCHES if name in train},
        "optim": {name: optim[name] for name in schedule if name in optim},
    }
