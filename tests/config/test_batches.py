"""How images are shared out to steps and ranks, against numbers that were worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from seer_scale.config.batches import Batches, in_words, resolve_batches
from seer_scale.config.recipe import Arguments, dump, parse
from seer_scale.errors import ConfigError

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
NAMES = ("images", "global_batch", "steps", "micro_batch_size", "gradient_accumulation")


def resolve(recipe: dict[str, int], ranks: int, **given: int) -> Batches:
    return resolve_batches({**dict.fromkeys(NAMES), **recipe, **given}, list(given), ranks)


def read(*argv: str, ranks: int) -> Arguments:
    return parse(["--recipe", *argv], recipes=RECIPES, ranks=ranks)


SEER = {"images": 1_000_000_000, "global_batch": 8192, "micro_batch_size": 16}
RG10B = {"images": 1_000_000_000, "global_batch": 7936, "micro_batch_size": 16}


@pytest.mark.parametrize(
    ("recipe", "ranks", "expected"),
    [
        # (micro-batch, accumulation, global batch, steps)
        (SEER, 512, (16, 1, 8192, 122_070)),
        (SEER, 64, (16, 8, 8192, 122_070)),
        (SEER, 1, (16, 512, 8192, 122_070)),
        (SEER, 2048, (4, 1, 8192, 122_070)),
        (SEER, 8192, (1, 1, 8192, 122_070)),
        # 124 images a rank: 4 is the largest divisor up to 16, and a quarter of it.
        (RG10B, 64, (4, 31, 7936, 126_008)),
        (RG10B, 8, (16, 62, 7936, 126_008)),
        # 31 a rank: only 1 divides, which is too small a micro-batch; 2 * 16 is 3 % off.
        (RG10B, 256, (16, 2, 8192, 122_070)),
        # 2,645.3 a rank: 165 * 16 is 0.2 % off, and as good as 529 * 5.
        (RG10B, 3, (16, 165, 7920, 126_262)),
        # 341.3 a rank: 21 * 16 is 1.6 % off; 26 * 13 is within a hundredth.
        (SEER, 24, (13, 26, 8112, 123_274)),
        # More ranks than images: an image each.
        (SEER, 10_000, (1, 1, 10_000, 100_000)),
        # An older recipe: steps and images per rank, on any number of ranks.
        ({"steps": 8, "micro_batch_size": 4}, 2, (4, 1, 8, 8)),
        ({"steps": 8, "micro_batch_size": 4, "gradient_accumulation": 3}, 5, (4, 3, 60, 8)),
        # Without a largest micro-batch nothing is accumulated.
        ({"images": 100, "global_batch": 10}, 2, (5, 1, 10, 10)),
    ],
)
def test_a_recipe_on_a_number_of_ranks(
    recipe: dict[str, int], ranks: int, expected: tuple[int, ...]
) -> None:
    found = resolve(recipe, ranks)
    assert (found.micro_batch, found.accumulation, found.global_batch, found.steps) == expected
    assert found.images == recipe.get("images", found.steps * found.global_batch)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        # (micro-batch, accumulation, global batch, steps, images), on 64 ranks
        ({"steps": 100}, (16, 8, 8192, 100, 819_200)),
        ({"images": 10**6}, (16, 8, 8192, 122, 10**6)),
        ({"global_batch": 4096}, (16, 4, 4096, 244_140, 10**9)),
        ({"global_batch": 4096, "steps": 10}, (16, 4, 4096, 10, 40_960)),
        # What is given of a rank's step stays, and the global batch follows.
        ({"micro_batch_size": 8}, (8, 1, 512, 1_953_125, 10**9)),
        ({"micro_batch_size": 8, "steps": 100}, (8, 1, 512, 100, 51_200)),
        ({"gradient_accumulation": 2}, (16, 2, 2048, 488_281, 10**9)),
        ({"micro_batch_size": 32, "gradient_accumulation": 4}, (32, 4, 8192, 122_070, 10**9)),
        # With the global batch beside it, the other factor follows.
        ({"micro_batch_size": 32, "global_batch": 8192}, (32, 4, 8192, 122_070, 10**9)),
        ({"gradient_accumulation": 2, "global_batch": 8192}, (64, 2, 8192, 122_070, 10**9)),
        # The same length said twice is no contradiction.
        ({"steps": 122_070, "images": 10**9}, (16, 8, 8192, 122_070, 10**9)),
    ],
)
def test_the_command_line_wins(given: dict[str, int], expected: tuple[int, ...]) -> None:
    found = resolve(SEER, 64, **given)
    assert expected == (
        *(found.micro_batch, found.accumulation, found.global_batch),
        *(found.steps, found.images),
    )


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (
            {"micro_batch_size": 24, "global_batch": 8192},
            "train.global_batch is 8,192, but train.micro_batch_size=24 cannot make it on 64 ranks "
            "(7,680 would be nearest): leave out one of them",
        ),
        (
            {"micro_batch_size": 8, "gradient_accumulation": 8, "global_batch": 8192},
            "train.global_batch is 8,192, but train.micro_batch_size=8 and "
            "train.gradient_accumulation=8 cannot make it on 64 ranks (4,096 would be nearest): "
            "leave out one of them",
        ),
        (
            {"steps": 100, "images": 10**6},
            "train.steps is 100 and train.images is 1,000,000, but steps of 8,192 images make 122 "
            "of them: leave out one of both",
        ),
    ],
)
def test_contradictions_are_refused(given: dict[str, int], sentence: str) -> None:
    with pytest.raises(ConfigError) as raised:
        resolve(SEER, 64, **given)
    assert str(raised.value) == sentence


@pytest.mark.parametrize("text", ["1e9", "1_000_000_000", "1,000,000,000", "1 000 000 000"])
def test_images_are_written_as_people_write_them(text: str) -> None:
    assert read("debug", f"train.images={text}", ranks=2).config.train.images == 10**9


@pytest.mark.parametrize("text", ["1.5", "1,5", "1e400", "-1e9", "0", "true", "1e16", "1,00,000"])
def test_what_is_no_number_of_images_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.images is .*an integer > 0"):
        read("debug", f"train.images={text}", ranks=2)


def test_notes_say_what_cannot_be_kept_and_the_key_that_helps() -> None:
    assert read("seer_256gf", ranks=512).notes == ()
    assert read("seer_256gf", ranks=8).notes == (
        "sharding.sync_bn_group_size is 8, where the recipe has 64, which does not divide 8 "
        "ranks: "
        "BatchNorm sees 128 images at a time, and more with a larger train.micro_batch_size",
        "SwAV balances its codes over the 128 images of a micro-batch of all ranks, not over the "
        "8,192 of a step: objective.queue_length=8064 adds those of earlier micro-batches",
    )
    helped = read("seer_256gf", "objective.queue_length=8064", ranks=64)
    assert helped.notes == ()
    (batch,) = read("seer_256gf", "train.micro_batch_size=8", ranks=64).notes
    assert batch == (
        "train.global_batch is 512 (8 images x 64 ranks x 1 micro-batch), where the recipe has "
        "8,192: add train.global_batch=8192 to keep it"
    )
    (batch,) = read("demo", ranks=3).notes
    assert batch == (
        "train.global_batch is 63 (21 images x 3 ranks x 1 micro-batch), because this number of "
        "ranks cannot share 64 images equally: a number of ranks that divides 64 can"
    )


def test_one_of_anything_is_not_written_as_several() -> None:
    train = read("demo", ranks=64).config.train
    assert in_words(train, 64).endswith("= 1 image x 64 ranks x 1 micro-batch")
    train = read("demo", "train.gradient_accumulation=2", ranks=1).config.train
    assert in_words(train, 1).endswith("= 64 images x 1 rank x 2 micro-batches")


def test_a_group_of_the_command_line_is_not_changed() -> None:
    given = read("seer_256gf", "sharding.sync_bn_group_size=64", ranks=8)
    assert given.config.sharding.sync_bn_group_size == 64  # which check_sharding refuses
    assert read("seer_256gf", ranks=96).config.sharding.sync_bn_group_size == 48


@pytest.mark.parametrize(
    ("more", "warmup", "frozen"),
    [
        ([], 8000, 313),
        # Another length: the same share of the run.
        (["train.images=1e8"], 800, 31),
        (["train.steps=1000"], 66, 3),
        # Another batch: the same images.
        (["train.global_batch=4096"], 16_000, 626),
        # Steps that are given stay steps.
        (["train.steps=1000", "optim.warmup_steps=10"], 10, 3),
        (["optim.warmup_share=0.5", "optim.freeze_prototypes_steps=7"], 61_035, 7),
    ],
)
def test_schedules_follow_the_run(more: list[str], warmup: int, frozen: int) -> None:
    optim = read("seer_256gf", *more, ranks=64).config.optim
    assert (optim.warmup_steps, optim.freeze_prototypes_steps) == (warmup, frozen)
    assert (optim.warmup_share, optim.freeze_prototypes_share) == (None, None)


def test_steps_and_share_of_one_length_are_refused() -> None:
    both = ("optim.warmup_steps=10", "optim.warmup_share=0.1")
    with pytest.raises(ConfigError, match=r"both state the same length: leave out one of them"):
        read("seer_256gf", *both, ranks=64)


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_the_file_of_a_run_keeps_its_batch_on_other_ranks(tmp_path: Path) -> None:
    before = read("seer_256gf", "train.images=1e8", ranks=64).config
    path = write(tmp_path / "config.yaml", dump(before))
    assert read(path, ranks=64).config == before
    after = read(path, ranks=256).config.train
    assert (after.micro_batch_size, after.gradient_accumulation) == (16, 2)
    assert (after.global_batch, after.steps) == (8192, before.train.steps)
    # A file says both steps and images; what is given replaces both.
    assert read(path, "train.images=1e9", ranks=64).config.train.steps == 122_070
    assert read(path, "train.steps=7", ranks=64).config.train.images == 7 * 8192


# What a run of `seer_256gf` on 64 ranks wrote before recipes owned their images.
OLDER: dict[str, Any] = {
    "train": {"steps": 122_070, "micro_batch_size": 16, "gradient_accumulation": 1},
    "optim": {"warmup_steps": 8000, "freeze_prototypes_steps": 313},
}


@pytest.mark.parametrize("ranks", [8, 64])
def test_a_run_of_an_earlier_version_goes_on_with_its_own_numbers(ranks: int) -> None:
    argv = ["--recipe", "seer_256gf", "--resume", "auto"]
    config = parse(argv, recipes=RECIPES, ranks=ranks, saved=OLDER).config
    assert (config.train.micro_batch_size, config.train.gradient_accumulation) == (16, 1)
    assert config.train.global_batch == 16 * ranks  # as before: with fewer ranks, a smaller batch
    assert config.train.steps == 122_070
    assert config.train.images == 122_070 * 16 * ranks
    assert (config.optim.warmup_steps, config.optim.freeze_prototypes_steps) == (8000, 313)
    # What the command line says wins over what was saved, as ever.
    argv += ["train.steps=1000", "optim.warmup_share=0.5"]
    changed = parse(argv, recipes=RECIPES, ranks=ranks, saved=OLDER).config
    assert (changed.train.steps, changed.train.micro_batch_size) == (1000, 16)
    assert (changed.optim.warmup_steps, changed.optim.freeze_prototypes_steps) == (500, 313)
    # A run of this version has `global_batch`, and follows the recipe.
    newer = {**OLDER, "train": {**OLDER["train"], "global_batch": 16 * ranks}}
    fresh = parse(argv, recipes=RECIPES, ranks=ranks)
    assert parse(argv, recipes=RECIPES, ranks=ranks, saved=newer) == fresh
