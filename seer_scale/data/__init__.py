"""From encoded images, near or far, to micro-batches of crops."""

from seer_scale.data.augment import MultiCrop
from seer_scale.data.batches import BadSample, MicroBatch
from seer_scale.data.cache import Cache
from seer_scale.data.device import DeviceBatches
from seer_scale.data.generate.tiles import Tiles, write_tiles
from seer_scale.data.loader import MicroBatchLoader, build_loader
from seer_scale.data.shard_manifest import Shard
from seer_scale.data.sources import Source, open_source

__all__ = [
    "BadSample",
    "Cache",
    "DeviceBatches",
    "MicroBatch",
    "MicroBatchLoader",
    "MultiCrop",
    "Shard",
    "Source",
    "Tiles",
    "build_loader",
    "open_source",
    "write_tiles",
]
