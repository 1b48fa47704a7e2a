"""Argument types and the argument parser that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from seer_scale.config.field_types import whole_number
from seer_scale.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """An argument parser that reports mistakes as a `ConfigError`: one sentence, no usage text.

    Attributes:
        example: values of the required arguments, shown when one of them is missing.
    """

    example = ""

    def error(self, message: str) -> NoReturn:
        """Raises `ConfigError` with argparse's message."""
        if self.example and message.startswith("the following arguments are required"):
            message += f", for example {self.example}"
        raise ConfigError(f"{message}; see --help")


def command_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """Builds the argument parser of a command; text and examples are printed as written."""
    return argparse.ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def images(text: str) -> int:
    """Reads a number of images, such as 1000000, 1,000,000 or 1e9."""
    value = whole_number(text)
    if not isinstance(value, int) or value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of images, such as 1e9")
    return value


def price(text: str) -> float:
    """Reads an amount of money above nothing, such as 2.5."""
    value = float(text)
    if not (0 < value < float("inf")):
        raise argparse.ArgumentTypeError(f"{text} is not a price above 0")
    return value


def at_least(least: int) -> Callable[[str], int]:
    """Returns a `type=` for an argument: an integer of `least` or more."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not {least} or more")
        return value

    return integer
