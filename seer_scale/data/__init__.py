"""From encoded images to micro-batches of crops."""

from seer_scale.data.augment import MultiCrop
from seer_scale.data.loader import BadSample, MicroBatch, MicroBatchLoader, build_loader
from seer_scale.data.sources import Source, open_source
from seer_scale.data.tiles import Tiles, write_tiles

__all__ = [
    "BadSample",
    "MicroBatch",
    "MicroBatchLoader",
    "MultiCrop",
    "Source",
    "Tiles",
    "build_loader",
    "open_source",
    "write_tiles",
]
