"""The shipped recipes against the numbers that were published (the papers, VISSL's configs)."""

from __future__ import annotations

from pathlib import Path

import pytest

from seer_scale.config import RunConfig
from seer_scale.config.recipe import parse

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "launch" / "recipes"
NAMES = sorted(path.stem for path in RECIPES.glob("*.yaml"))
SEER = ["seer_32gf", "seer_64gf", "seer_128gf", "seer_256gf", "seer_rg10b"]
LARGE = ["swav_in1k_regnety_16gf", *SEER]
GPUS = {
    "swav_in1k_regnety_16gf": 8 * 8,
    "seer_32gf": 16 * 8,
    "seer_64gf": 16 * 8,
    "seer_128gf": 16 * 8,
    "seer_256gf": 64 * 8,
    "seer_rg10b": 62 * 8,
}


def recipe(name: str, ranks: int = 0) -> RunConfig:
    """The recipe on the published number of GPUs, or on another."""
    return parse(["--recipe", name], recipes=RECIPES, ranks=ranks or GPUS.get(name, 2)).config


def global_batch(name: str) -> int:
    train = recipe(name).train
    return train.micro_batch_size * train.gradient_accumulation * GPUS[name]


def test_all_eight_are_there() -> None:
    assert set(NAMES) == {"debug", "demo", *LARGE}


@pytest.mark.parametrize("name", NAMES)
def test_parses_with_its_own_name(name: str) -> None:
    config = recipe(name)
    assert config.recipe == name
    assert config.run.dir == f"runs/{name}"
    assert config.tracking.registered_name == f"seer-{name}"


@pytest.mark.parametrize("name", NAMES)
def test_says_what_it_stands_for_and_how_to_start_it(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text()
    head = text[: text.index("\ntrain:")]
    assert all(line.startswith("#") for line in head.strip().splitlines())
    command = " ".join(head.replace("#", " ").replace("\\", " ").split())
    assert f"launch/pretrain.py --recipe {name} --deepspeed_config ds_configs/zero" in command
    if name in LARGE:
        assert f"{recipe(name).train.micro_batch_size} images * {GPUS[name]} GPUs" in head
        assert f"= {global_batch(name):,} per step" in head


@pytest.mark.parametrize(
    ("name", "batch", "steps", "peak"),
    [
        # 800 epochs of ImageNet-1k, one pass over 1e9 images for the others
        ("swav_in1k_regnety_16gf", 4096, round(800 * 1_281_167 / 4096), 4.8),
        ("seer_32gf", 4096, 1_000_000_000 // 4096, 4.8),
        ("seer_64gf", 4096, 1_000_000_000 // 4096, 4.8),
        ("seer_128gf", 4096, 244_140, 4.8),
        ("seer_256gf", 8192, 122_070, 9.6),
        ("seer_rg10b", 7936, 126_008, 9.3),
    ],
)
def test_batch_length_and_peak_learning_rate(
    name: str, batch: int, steps: int, peak: float
) -> None:
    config = recipe(name)
    assert global_batch(name) == config.train.global_batch == batch
    assert config.train.steps == steps
    assert config.train.gradient_accumulation == 1
    assert config.optim.lr is None
    assert config.optim.base_lr * batch / 256 == pytest.approx(peak, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "warmup"),
    [
        ("swav_in1k_regnety_16gf", round(10 * 1_281_167 / 4096)),
        ("seer_32gf", round(2 * 0.0128 * 244_140)),
        ("seer_64gf", 8000),
        ("seer_128gf", 8000),
        ("seer_256gf", 8000),
        ("seer_rg10b", round(0.043648 * 126_008)),
    ],
)
def test_warmup(name: str, warmup: int) -> None:
    assert recipe(name).optim.warmup_steps == warmup


@pytest.mark.parametrize(
    ("name", "trunk", "head_dims", "prototypes"),
    [
        ("swav_in1k_regnety_16gf", "regnety_16gf", (3024, 128), 3000),
        ("seer_32gf", "regnety_32gf", (4096, 4096, 256), 16000),
        ("seer_64gf", "regnety_64gf", (8192, 8192, 256), 16000),
        ("seer_128gf", "regnety_128gf", (8192, 8192, 256), 16000),
        ("seer_256gf", "regnety_256gf", (8192, 8192, 256), 16000),
        ("seer_rg10b", "rg_10b", (8192, 8192, 256), 16000),
    ],
)
def test_model(name: str, trunk: str, head_dims: tuple[int, ...], prototypes: int) -> None:
    model = recipe(name).model
    assert (model.trunk, model.head_dims, model.prototypes) == (trunk, head_dims, prototypes)
    assert model.head_batch_norm == (name == "seer_32gf")


@pytest.mark.parametrize(
    ("name", "epsilon", "iterations"),
    [
        ("swav_in1k_regnety_16gf", 0.05, 3),
        ("seer_32gf", 0.05, 10),
        ("seer_64gf", 0.05, 10),
        ("seer_128gf", 0.05, 10),
        ("seer_256gf", 0.05, 10),
        ("seer_rg10b", 0.03, 10),
    ],
)
def test_objective(name: str, epsilon: float, iterations: int) -> None:
    objective = recipe(name).objective
    assert objective.name == "swav"
    assert objective.options == {
        "temperature": 0.1,
        "epsilon": epsilon,
        "sinkhorn_iterations": iterations,
    }


@pytest.mark.parametrize(
    ("name", "sizes", "counts", "group"),
    [
        ("swav_in1k_regnety_16gf", (224, 96), (2, 6), 8),
        ("seer_32gf", (224, 96), (2, 4), 32),
        ("seer_64gf", (224, 96), (2, 4), 64),
        ("seer_128gf", (224, 96), (2, 4), 64),
        ("seer_256gf", (224, 96), (2, 4), 64),
        ("seer_rg10b", (160, 96), (2, 4), 8),
    ],
)
def test_crops_and_batch_norm_groups(
    name: str, sizes: tuple[int, ...], counts: tuple[int, ...], group: int
) -> None:
    config = recipe(name)
    assert (config.data.crop_sizes, config.data.crop_counts) == (sizes, counts)
    assert config.data.scales == ((0.14, 1.0), (0.05, 0.14))
    assert (config.data.color_distortion, config.data.blur_probability) == (1.0, 0.5)
    assert config.sharding.sync_bn_group_size == group
    assert GPUS[name] % group == 0


@pytest.mark.parametrize("name", LARGE)
def test_optimizer(name: str) -> None:
    assert recipe(name).train.precision == "amp-o1"  # float16 was published for all
    optim = recipe(name).optim
    assert optim.larc
    assert (optim.trust_coefficient, optim.momentum, optim.base_lr) == (1e-3, 0.9, 0.3)
    assert optim.weight_decay == (1e-5 if name in ("seer_256gf", "seer_rg10b") else 1e-6)
    assert optim.end_lr_ratio == 1e-3
    assert optim.freeze_prototypes_steps == 313
    constant = ("seer_64gf", "seer_128gf")
    assert optim.schedule == ("constant" if name in constant else "cosine")


def test_rg10b_recomputes_in_its_published_groups() -> None:
    config = recipe("seer_rg10b")
    assert config.sharding.activation_checkpointing == "groups"
    assert config.sharding.checkpoint_groups == ((2,), (7,), (9, 17), ())
    assert config.checkpoint.every == 100


@pytest.mark.parametrize("name", ["debug", "demo"])
def test_small_ones_fit_a_cpu(name: str) -> None:
    config = recipe(name)
    assert config.model.trunk == "regnety_debug"
    assert config.train.precision == "fp32"
    assert config.train.micro_batch_size * sum(config.data.crop_counts) <= 32 * 6
    assert config.optim.freeze_prototypes_steps < config.train.steps


IMAGES = {
    "demo": 20_480,
    "swav_in1k_regnety_16gf": 250_228 * 4096,
    **dict.fromkeys(SEER, 1_000_000_000),
}


@pytest.mark.parametrize("ranks", [0, 8, 64])
@pytest.mark.parametrize("name", IMAGES)
def test_a_recipe_trains_its_images_on_any_number_of_gpus(name: str, ranks: int) -> None:
    published, config = recipe(name), recipe(name, ranks)
    world, train = ranks or GPUS.get(name, 2), config.train
    made = train.micro_batch_size * world * train.gradient_accumulation
    assert (train.images, train.global_batch, made) == (
        IMAGES[name],
        published.train.global_batch,
        published.train.global_batch,
    )
    # All steps are of whole batches: what is left over makes none.
    assert 0 <= IMAGES[name] - train.steps * made < made
    largest = {"demo": 64}.get(name, published.train.micro_batch_size)
    assert train.micro_batch_size <= largest
    # The schedule is the published one, step by step.
    assert config.optim == published.optim


def test_debug_says_steps_and_takes_as_many_everywhere() -> None:
    for ranks in (1, 2, 8, 64):
        train = recipe("debug", ranks).train
        assert (train.steps, train.micro_batch_size, train.gradient_accumulation) == (8, 4, 1)
        assert (train.global_batch, train.images) == (4 * ranks, 32 * ranks)
