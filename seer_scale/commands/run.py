"""Runs `seer-scale COMMAND ...`: finds the command and exits with its status.

Only the requested command is imported, so `--help` and `--version` answer at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from contextlib import suppress
from importlib import import_module
from typing import NoReturn

from seer_scale import __version__
from seer_scale.errors import ConfigError, UserError, exit_with
from seer_scale.storage.disk_refusal import refusal, sentence

COMMANDS = {
    "pretrain": "train a trunk without labels, in one process",
    "evaluate": "judge a trunk: k-NN, linear, fine-tuning, detection, ...",
    "study": "train and judge many sizes, and fit their curves",
    "plan": "memory, traffic, time and cost of a run before it starts",
    "convert": "weights to and from VISSL, timm, Hugging Face, torchvision, ONNX",
    "checkpoint": "inspect, verify, consolidate and prune what was saved",
    "data": "inspect, index and time a collection of images",
    "register": "put a trunk into MLflow's model registry",
    "sync": "send to MLflow what runs recorded while it was away",
    "shapes": "render a labelled set of images to try things on",
    "doctor": "check this machine, and say what each finding means",
    "completion": "print a completion script for bash, zsh or fish",
}
HELP = "\n".join(
    [
        "usage: seer-scale COMMAND ...",
        "",
        "Self-supervised pretraining of RegNets; `seer-scale COMMAND --help` says more.",
        "",
        *(f"  {name:<12}{about}" for name, about in COMMANDS.items()),
        "",
        "More than one process, for pretrain and evaluate:",
        "  torchrun --nproc-per-node 8 -m seer_scale pretrain ...",
        "  deepspeed --no_local_rank --module seer_scale pretrain ...",
        "",
        "  --version   print the version",
        "  --help      print this",
    ]
)


def run(command: str, argv: list[str]) -> NoReturn:
    """Runs one of `COMMANDS` and exits; a user's mistake is one sentence and an exit status.

    A full or read-only disk is reported in one sentence too.
    """
    for stream in (sys.stdout, sys.stderr):
        # A path that the user gave may have bytes that are no characters of the terminal.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        module = import_module(f"seer_scale.commands.{command}")
        status = module.main(argv)
        sys.stdout.flush()  # it may lie on such a disk
        sys.exit(status)
    except UserError as error:
        exit_with(error)
    except BrokenPipeError:
        reader_is_gone()
    except Exception as error:
        refused = refusal(error)
        if refused is None:
            raise
        exit_with(UserError(sentence(refused, argv)))
    except KeyboardInterrupt:
        with suppress(OSError):  # the streams may be files on a full disk
            print("interrupted", file=sys.stderr, flush=True)
            sys.stdout.flush()
        # The interpreter would wait for its threads, and one may read from a dead disk.
        os._exit(128 + signal.SIGINT)


def reader_is_gone() -> NoReturn:
    """Exits quietly when the reader of the output is gone, as other programs do."""
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    )  # for the interpreter's last word
    sys.exit(128 + signal.SIGPIPE)


def main() -> NoReturn:
    """Entry point of the console script."""
    command, *argv = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help", "help"):
        try:
            print(HELP, flush=True)
        except BrokenPipeError:
            reader_is_gone()
        sys.exit(0)
    if command == "--version":
        print(f"seer-scale {__version__}")
        sys.exit(0)
    if command.startswith("--local_rank"):
        exit_with(
            ConfigError(f"{command} comes from the deepspeed launcher: add --no_local_rank to it")
        )
    if command not in COMMANDS:
        from seer_scale.errors import did_you_mean

        hint = did_you_mean(command, COMMANDS) or ":"
        known = ", ".join(COMMANDS)
        exit_with(ConfigError(f"{command} is not a command{hint} the commands are {known}"))
    sys.argv[0] = f"seer-scale {command}"  # what argparse calls the program
    run(command, argv)
