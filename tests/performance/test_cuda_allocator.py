"""Settings of CUDA's allocator: made before torch is imported, and never over the user's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from seer_scale.performance.cuda_allocator import SETTING, VARIABLES

# Runs the command up to its first import of torch, and prints what torch would read.
PROGRAM = """
import builtins, os, sys
from seer_scale.commands.pretrain import main

honest = builtins.__import__

def watched(name, *rest, **more):
    if name == "torch":
        print({name: os.environ.get(name) for name in sys.argv[1].split()})
        sys.exit()
    return honest(name, *rest, **more)

builtins.__import__ = watched
main(["--recipe", "debug", "run.dir=unused", "data.path=unused"])
"""


@pytest.mark.parametrize("given", [{}, *({name: "max_split_size_mb:64"} for name in VARIABLES)])
def test_a_training_sets_it_before_torch_unless_the_user_did(given: dict[str, str]) -> None:
    others = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, " ".join(VARIABLES)],
        env={**others, **given},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    expected = given or {VARIABLES[0]: SETTING}
    assert done.stdout.strip() == str({name: expected.get(name) for name in VARIABLES})
