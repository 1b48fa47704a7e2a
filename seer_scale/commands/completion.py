"""Prints a completion script: `source <(seer-scale completion bash)`."""

from __future__ import annotations

import argparse
from importlib import import_module

from seer_scale.config.argument_types import command_parser

EXAMPLES = """\
  source <(seer-scale completion bash)                        # in ~/.bashrc
  seer-scale completion zsh > "${fpath[1]}/_seer-scale"       # then start zsh anew
  seer-scale completion fish > ~/.config/fish/completions/seer-scale.fish
"""


def parser() -> argparse.ArgumentParser:
    """Of this command's line."""
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    return parser


def main(argv: list[str]) -> int:
    """The command line; 0."""
    arguments = parser().parse_args(argv)
    import shtab

    print(shtab.complete(whole_parser(), arguments.shell))
    return 0


def whole_parser() -> argparse.ArgumentParser:
    """`seer-scale` with all of its commands, as shtab reads it."""
    from seer_scale.commands.run import COMMANDS

    whole = argparse.ArgumentParser(prog="seer-scale", description="Pretraining of RegNets.")
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers(dest="command")
    for name, about in COMMANDS.items():
        own = import_module(f"seer_scale.commands.{name}").parser()
        commands.add_parser(name, help=about, description=about, parents=[own], add_help=False)
    return whole
