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


def command_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """Of a command: its text and its examples as they are written, no option shortened."""
    return argparse.ArgumentParser(
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def at_least(least: int) -> Callable[[str], int]:
    """An integer of `least` or more, as `type=` of an argument."""

    def integer(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is not {least} or more")
        return value

    return integer
