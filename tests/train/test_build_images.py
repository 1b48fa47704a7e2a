"""Keys of a recipe that decide about crops reach the transform."""

from __future__ import annotations

from harness.jobs import ROOT, arguments
from seer_scale.config.recipe import parse
from seer_scale.train.build_images import transform_of


def test_keys_of_crops_reach_the_transform() -> None:
    asked = (
        *("data.crop_sizes=[64,32]", "data.crop_counts=[3,5]"),
        *("data.crop_scales=[[0.5,0.9],[0.1,0.2]]", "data.color_distortion=0.25"),
        "data.blur_probability=0.125",
    )
    config = parse(
        arguments("images", "run")[:4] + list(asked), recipes=ROOT / "launch" / "recipes", ranks=1
    ).config
    transform = transform_of(config)
    assert (transform.sizes, transform.counts) == ((64, 32), (3, 5))
    assert transform.scales == ((0.5, 0.9), (0.1, 0.2))
    assert (transform.color_distortion, transform.blur_probability) == (0.25, 0.125)
