"""Types of configuration values, and the strict base class of every section."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, Strict

from seer_scale.config.home_folder import expand_home

TRUNK_STRIDE = 32  # a smaller crop would leave no pixel for the last stage
_GROUPED = re.compile(r"[1-9][0-9]{0,2}(?:[,_ '][0-9]{3})+")


def whole_number(value: Any) -> Any:
    """Turns a large whole number as people write it into an integer: 1e9, 1,000,000, 2_500_000.

    Returns every other value as it is.
    """
    if isinstance(value, str):
        text = value.strip()
        if _GROUPED.fullmatch(text):
            return int(re.sub(r"\D", "", text))
        try:
            value = int(text) if text.isascii() and text.isdigit() else float(text)
        except ValueError:
            return value
    # Above 2 ** 53 a float no longer tells one whole number from the next.
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return int(value)
    return value


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expand_home)]
Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(gt=0), BeforeValidator(whole_number)]
# torch is seeded with this shifted left by 20 bits, which has to fit its 64.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML has lists only: the outer container is converted, what is inside stays strict.
PositiveInts = Annotated[tuple[Positive, ...], Strict(False), Field(min_length=1)]
CropSide = Annotated[int, Field(ge=TRUNK_STRIDE)]
CropSizes = Annotated[tuple[CropSide, ...], Strict(False), Field(min_length=1)]
Scale = Annotated[tuple[PositiveFloat, PositiveFloat], Strict(False)]
Scales = Annotated[tuple[Scale, ...], Strict(False), Field(min_length=1)]
StepRange = Annotated[tuple[Positive, Positive], Strict(False)]
Ranks = Annotated[tuple[NonNegative, ...], Strict(False), Field(min_length=1)]
BlockGroups = Annotated[tuple[Annotated[tuple[Positive, ...], Strict(False)], ...], Strict(False)]


# The pattern in words, for --help and the sentence after a mistake.
Checkpointing = Annotated[
    str,
    Field(
        pattern=r"^(none|full|groups|auto:(\d+(\.\d+)?|\.\d+))$",
        json_schema_extra={"allowed": "none, full, groups or auto:GIB (e.g. auto:12.5)"},
    ),
]


class Section(BaseModel):
    """Base of every section: immutable, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def as_lists(rows: tuple[tuple[Any, ...], ...] | None) -> list[list[Any]]:
    """Rows as lists, for messages."""
    return [list(row) for row in rows or ()]
