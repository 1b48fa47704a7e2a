"""`seer-scale COMMAND ...`: finds the command, runs it to its exit status.

Nothing is imported but the command that is asked for, so `--help` and `--version` answer at once.
"""

from __future__ import annotations

import os
import signal
import sys
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
        "More than one process: `deepspeed launch/pretrain.py ...` in a clone, or anywhere",
        "`torchrun --nproc-per-node 8 -m seer_scale pretrain ...`, which goes for evaluate too.",
        "",
        "  --version   print the version",
        "  --help      print this",
    ]
)


def run(command: str, argv: list[str]) -> NoReturn:
    """Runs one of `COMMANDS` and leaves; a user's mistake is one sentence and its exit status.

    So is a disk that takes nothing, whoever tried to write to it.
    """
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
        print("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def reader_is_gone() -> NoReturn:
    """Leaves when whoever read the output has had enough, as other programs do."""
    os.dup2(
        os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
    )  # for the interpreter's last word
    sys.exit(128 + signal.SIGPIPE)


def main() -> NoReturn:
    """The console script."""
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
    if command not in COMMANDS:
        from seer_scale.config.schema import did_you_mean

        hint = did_you_mean(command, COMMANDS) or ":"
        known = ", ".join(COMMANDS)
        exit_with(ConfigError(f"{command} is no command{hint} the commands are {known}"))
    sys.argv[0] = f"seer-scale {command}"  # what argparse calls the program
    run(command, argv)
