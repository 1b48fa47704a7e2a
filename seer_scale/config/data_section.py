"""Section `data` of a configuration."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from seer_scale.config.field_types import (
    CropSizes,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    PathText,
    Positive,
    PositiveFloat,
    PositiveInts,
    Scales,
    Section,
    as_lists,
)


class DataSection(Section):
    path: PathText = Field(
        description=(
            "image folder, tar shard, folder or pattern of shards, or manifest of shards "
            "(.jsonl, .parquet); a local path, http(s)://, s3:// or any address that fsspec"
            " reads"
        )
    )
    crop_sizes: CropSizes = Field(
        description="side of the crops in pixels, one per resolution, e.g. [224, 96]"
    )
    crop_counts: PositiveInts = Field(
        description="crops per image, one number per resolution, e.g. [2, 4]"
    )
    crop_scales: Scales | None = Field(
        None,
        description=(
            "smallest and largest share of the image's area, one pair per resolution; null "
            "means [0.14, 1.0] for the first resolution and [0.05, 0.14] for the others"
        ),
    )
    color_distortion: NonNegativeFloat = Field(1.0, description="strength of colour jitter")
    blur_probability: Fraction = Field(
        0.5, description="probability of Gaussian blur, with a radius of 0.1 to 2 pixels"
    )
    augment_on: Literal["host", "device"] = Field(
        "host",
        description=(
            "where crops are flipped, distorted and blurred: in the loader's threads "
            "(host), or in batches on the device"
        ),
    )
    workers: NonNegative = Field(
        4,
        description="loader threads per rank, in a process of their own; 0 loads in the trainer",
    )
    prefetch: Positive = Field(4, description="micro-batches prepared ahead, per rank")
    window: Positive = Field(
        16, description="expert: number of shards whose images are shuffled together"
    )
    refresh: (
        Annotated[
            str,
            Field(
                pattern=r"^every [1-9]\d* (steps|hours)$",
                json_schema_extra={"allowed": "every N steps or every N hours"},
            ),
        ]
        | None
    ) = Field(
        None, description="interval at which a manifest of shards is read again; null means never"
    )
    max_age_days: Positive | None = Field(
        90,
        description=(
            "with refresh: days after publication at which a shard leaves the collection; "
            "null keeps all shards"
        ),
    )
    max_bad_fraction: Fraction = Field(
        0.2, description="share of unusable images among the last 1000 that ends the run"
    )
    cache_dir: PathText | None = Field(
        None,
        description=(
            "folder for copies of remote shards, on a disk of the node; null means "
            "seer-scale/shards below XDG_CACHE_HOME, SLURM_TMPDIR, TMPDIR or ~/.cache"
        ),
    )
    cache_gib: PositiveFloat = Field(50.0, description="size limit of data.cache_dir in GiB")
    remote: Literal["auto", "copies", "images"] = Field(
        "auto",
        description=(
            "what a node takes from servers: copies of whole shards, or images one by one, which "
            "needs a manifest with indexes; auto means images on several nodes, copies on one"
        ),
    )

    @model_validator(mode="after")
    def _crops_fit_together(self) -> Self:
        sizes, counts, scales = list(self.crop_sizes), list(self.crop_counts), self.crop_scales
        if len(sizes) != len(counts):
            raise ValueError(
                f"data.crop_sizes and data.crop_counts need one entry per resolution each, but "
                f"have {len(sizes)} ({sizes}) and {len(counts)} ({counts})"
            )
        if scales is not None and len(scales) != len(sizes):
            raise ValueError(
                f"data.crop_scales needs one entry per resolution, but has {len(scales)} "
                f"({as_lists(scales)}) for data.crop_sizes {sizes}: name them all, or set "
                f"data.crop_scales=null for the usual ones"
            )
        for low, high in self.scales:
            if not low < high <= 1:
                raise ValueError(
                    f"data.crop_scales holds [{low}, {high}], but a scale is [smallest, largest] "
                    f"with 0 < smallest < largest <= 1"
                )
        if sum(self.crop_counts) < 2:
            raise ValueError(
                f"data.crop_counts is {list(self.crop_counts)}, but an image needs at least 2 "
                f"crops, since the objective compares one with another"
            )
        return self

    @property
    def scales(self) -> tuple[tuple[float, float], ...]:
        """`crop_scales`, or SwAV's: large crops of the first resolution, small ones of the rest."""
        return self.crop_scales or ((0.14, 1.0), *[(0.05, 0.14)] * (len(self.crop_sizes) - 1))

    @property
    def refresh_every(self) -> tuple[int, Literal["steps", "hours"]] | None:
        """The number and the unit of `refresh`."""
        if self.refresh is None:
            return None
        _, number, unit = self.refresh.split()
        return int(number), "steps" if unit == "steps" else "hours"
