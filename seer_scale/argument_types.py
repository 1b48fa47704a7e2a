"""What more than one launcher's command line is made of."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from seer_scale.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are `ConfigError`s: one sentence, without a usage."""

    def error(self, message: str) -> NoReturn:
        """Raises the mistake."""
        raise ConfigError(f"{message}; see --help")


def at_least(least: int) -> Callable[[str], int]:
    """An integer of `least` or more, as `type=` of an argument."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not {least} or more")
        return value

    return integer
