"""Bytes that each node takes from a server in one epoch, for 1, 2 and 8 nodes.

    python benchmarks/node_bytes.py --images 500 --shards 16 --kib 100

A server on loopback counts what it sends. A node is a reader with a cache of its own, which reads
the images of its rank in the order of a training. Images are random bytes: nothing is decoded.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from harness.file_server import FileServer
from harness.node_bytes import measure, write_collection


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=500, help="images of a shard (500)")
    parser.add_argument("--shards", type=int, default=16, help="shards (16)")
    parser.add_argument("--kib", type=int, default=100, help="KiB of an image (100)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = write_collection(
            Path(folder) / "shards",
            shards=arguments.shards,
            images=arguments.images,
            size=arguments.kib << 10,
        )
        server = FileServer(Path(folder) / "shards")
        print(f"{arguments.shards} shards of {arguments.images} images, {whole / 2**20:.1f} MiB")
        print("| nodes | data.remote | MiB a node | share of the collection | requests a node |")
        print("| --- | --- | --- | --- | --- |")
        for nodes in (1, 2, 8):
            for how in ("copies", "images"):
                row, _ = measure(server, Path(folder), nodes, how)
                share = row.bytes / whole
                print(
                    f"| {nodes} | {how} | {row.bytes / 2**20:.1f} | {share:.3f} | "
                    f"{row.requests:.0f} |",
                    flush=True,
                )
        server.stop()


if __name__ == "__main__":
    main()
