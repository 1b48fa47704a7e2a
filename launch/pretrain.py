"""Pretrains a trunk: `deepspeed launch/pretrain.py --recipe demo --deepspeed_config FILE`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from seer_scale.commands.run import run

if __name__ == "__main__":  # processes that are spawned import this file too
    run("pretrain", sys.argv[1:])
