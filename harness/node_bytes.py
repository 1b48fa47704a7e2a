"""What nodes take from a server in one epoch, each a reader with a cache of its own."""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from harness.file_server import FileServer
from seer_scale.data.cache import Cache
from seer_scale.data.index_report import index
from seer_scale.data.order import Order, rank_positions
from seer_scale.data.sources import open_source

BATCH = 8  # images of a rank and step


class Row(NamedTuple):
    """What was seen with so many nodes.

    Attributes:
        bytes: bytes sent to a node, on average.
        requests: requests of a node, on average.
    """

    bytes: float
    requests: float


def write_collection(folder: Path, *, shards: int, images: int, size: int) -> int:
    """Writes shards of random bytes and their manifest with indexes; returns the shards' bytes."""
    folder.mkdir()
    for number in range(shards):
        with tarfile.open(folder / f"{number:04}.tar", "w") as tar:
            for image in range(images):
                header = tarfile.TarInfo(f"{number:04}_{image:06}.jpg")
                header.size = size
                tar.addfile(header, BytesIO(os.urandom(size)))
    index(f"{folder}/*.tar", None, str(folder / "shards.jsonl"), lambda line: None)
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


def read_epoch(url: str, cache: Cache, rank: int, nodes: int) -> Iterator[tuple[int, bytes]]:
    """Yields position and image of one rank's share of an epoch, as its loader reads them."""
    source = open_source(url, cache)
    order = Order(source.shard_sizes, seed=0, version=source.version)
    stream = rank_positions(
        0, micro_batch_size=BATCH, gradient_accumulation=1, rank=rank, world_size=nodes
    )
    for positions in islice(stream, len(source) // (BATCH * nodes)):
        for position in positions:
            yield position, source.read(order.index(order.place(position)))


def measure(
    server: FileServer, scratch: Path, nodes: int, how: str
) -> tuple[Row, dict[int, bytes]]:
    """Reads an epoch on so many nodes; returns the row, and every position's image.

    `how` is copies or images, as `data.remote`.
    """
    sent, requests = server.sent, len(server.requests)
    found: dict[int, bytes] = {}
    for rank in range(nodes):
        cache = Cache(scratch / f"{how}-{nodes}-{rank}", 50 << 30, one_by_one=how == "images")
        url = f"http://127.0.0.1:{server.port}/shards.jsonl"
        found.update(read_epoch(url, cache, rank, nodes))
    row = Row((server.sent - sent) / nodes, (len(server.requests) - requests) / nodes)
    return row, found
