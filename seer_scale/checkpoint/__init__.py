"""Saving and resuming: every rank writes the slices that it holds, as safetensors.

A checkpoint is a folder `step_<8 digits>` that appears by one rename once all of it is on disk, so
a killed save leaves the previous one as it was. Reading copies any run of elements of any tensor,
whatever slices they were written in. Nothing is pickled.
"""

from seer_scale.checkpoint.finding import choose, find, first_whole
from seer_scale.checkpoint.manifest import checkpoint_folder, list_checkpoints
from seer_scale.checkpoint.reader import CheckpointReader
from seer_scale.checkpoint.saving import Outcome, Saver, save

__all__ = [
    "CheckpointReader",
    "Outcome",
    "Saver",
    "checkpoint_folder",
    "choose",
    "find",
    "first_whole",
    "list_checkpoints",
    "save",
]
