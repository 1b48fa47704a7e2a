"""`seer-scale data` in a clone that is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seer_scale.commands.run import run

if __name__ == "__main__":  # processes that are spawned import this file too
    run("data", sys.argv[1:])
