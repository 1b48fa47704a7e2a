"""Builds an objective from a name and a recipe's options; third parties can install their own.

Options are checked against the constructor's own signature, so an objective states them once.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from seer_scale.errors import ConfigError, suggestion
from seer_scale.objectives.simclr import SimCLR
from seer_scale.objectives.swav import SwAV

OBJECTIVES: dict[str, type] = {"swav": SwAV, "simclr": SimCLR}

ENTRY_POINTS = "seer_scale.objectives"
NOT_OPTIONS = ("crops", "group")  # the run's to decide, not the recipe's objective section


class Objective(Protocol):
    """The call of every objective; the package's docstring has the optional parts."""

    def __call__(
        self, embeddings: Tensor, scores: Tensor
    ) -> tuple[Tensor, Mapping[str, Tensor | float]]:
        """Returns loss and metrics of one micro-batch.

        Args:
            embeddings: [crops * B, D], unit rows, crop-major.
            scores: [crops * B + queue rows, K].
        """


def build_objective(name: str, *, crops: int, options: Mapping[str, Any]) -> Objective:
    """Constructs the objective `name`.

    Args:
        name: key of `OBJECTIVES`, or of an installed entry point; the built-in ones go first.
        crops: crops per image, over all resolutions.
        options: values of its other keyword arguments as YAML gives them: lists for tuples.

    Raises:
        ConfigError: if there is no such objective, or it does not take these options.
    """
    constructor = _find(name)
    values = _checked(name, constructor, options)
    try:
        objective: Objective = constructor(crops=crops, **values)
    except ValueError as error:
        sentence = str(error)
        if sentence.split(" ", 1)[0] in options:
            raise ConfigError(f"objective.{sentence}") from None
        given = ", ".join(f"objective.{key}={value!r}" for key, value in options.items())
        raise ConfigError(
            f"objective {name!r} refuses {crops} crops with {given or 'its default options'}: "
            f"{sentence}"
        ) from None
    return objective


def check_options(name: str, options: Mapping[str, Any], *, crops: int = 6) -> None:
    """Raises the errors of `build_objective` before any other part of a run exists.

    Raises:
        ConfigError: if there is no such objective, or it does not take these options.
    """
    build_objective(name, crops=crops, options=options)


def objective_names() -> list[str]:
    """Names of the objectives here and in installed packages."""
    return sorted({*OBJECTIVES, *(offer.name for offer in entry_points(group=ENTRY_POINTS))})


def _find(name: str) -> Any:
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    offers = tuple(entry_points(group=ENTRY_POINTS, name=name))
    if len(offers) > 1:
        packages = " and ".join(sorted(_package(offer) for offer in offers))
        raise ConfigError(
            f"objective.name is {name!r}, which {packages} both offer: uninstall one of them"
        )
    for offer in offers:
        try:
            return offer.load()
        except Exception as error:
            raise ConfigError(
                f"objective.name is {name!r}, but the installed package {_package(offer)}, which "
                f"offers it as {offer.value}, cannot be imported: {type(error).__name__}: {error}"
            ) from error
    known = objective_names()
    raise ConfigError(
        f"objective.name is {name!r}, which is not an objective: "
        + suggestion(name, known, f"known are {', '.join(known)}")
    )


def _checked(name: str, constructor: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Converts options to the types of the constructor's annotations."""
    taken = {
        key: parameter
        for key, parameter in inspect.signature(constructor, eval_str=True).parameters.items()
        if key not in NOT_OPTIONS and parameter.kind is not parameter.VAR_KEYWORD
    }
    for key, parameter in taken.items():
        if parameter.default is parameter.empty and key not in options:
            raise ConfigError(f"objective {name!r} needs objective.{key} ({parameter})")
    values = {}
    for key, value in options.items():
        if key not in taken:
            raise ConfigError(
                f"objective.{key} is not an option of objective {name!r}: "
                + suggestion(key, list(taken), f"it takes {', '.join(taken) or 'none'}")
            )
        annotation = taken[key].annotation
        adapter = TypeAdapter(Any if annotation is inspect.Parameter.empty else annotation)
        try:
            # Strict, but a list in JSON may become a tuple, as one in YAML should.
            values[key] = adapter.validate_json(json.dumps(value, default=str), strict=True)
        except ValidationError as error:
            detail = error.errors()[0]["msg"]
            raise ConfigError(
                f"objective.{key} is {value!r}, but objective {name!r} takes {taken[key]} "
                f"({detail[0].lower()}{detail[1:]})"
            ) from None
    return values


def _package(offer: EntryPoint) -> str:
    return offer.dist.name if offer.dist else offer.module
