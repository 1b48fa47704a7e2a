"""Measures time and memory of torch.distributed.checkpoint beside the project's rank files.

    python benchmarks/storage.py [--gib 1]

Saves one rank's slices, flat float32 tensors, blocking; then loads them by halves, as another
number of ranks would. torch.distributed.checkpoint writes Hugging Face's format. Each way runs in a
process of its own, so that its peak memory is its own. Results are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402

ELEMENTS = 1 << 24  # per tensor: 64 MiB


def slices(gib: float) -> dict[str, Tensor]:
    """Makes tensors of `gib` GiB in total."""
    count = max(1, int(gib * 2**30 / (ELEMENTS * 4)))
    return {f"layer{index}": torch.full((ELEMENTS,), float(index)) for index in range(count)}


def peak_gib() -> float:
    """Peak memory of this process in GiB, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def ours(state: dict[str, Tensor], folder: Path) -> tuple[float, float]:
    """Measures the seconds to save, with a checksum, and to load rank files."""
    from seer_scale.storage.tensor_file import Kind, TensorFile, write_tensors

    kinds = {key: Kind.of(value) for key, value in state.items()}
    began = time.perf_counter()
    write_tensors(folder / "rank_00000.safetensors", kinds, state.__getitem__)
    saved = time.perf_counter()
    file = TensorFile(folder / "rank_00000.safetensors")
    for key in state:
        file.read(key, 0, ELEMENTS // 2, state[key][: ELEMENTS // 2])
    return saved - began, time.perf_counter() - saved


def dcp(state: dict[str, Tensor], folder: Path) -> tuple[float, float]:
    """Measures the seconds to save and to load with torch.distributed.checkpoint."""
    from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
    from torch.distributed.checkpoint.hf_storage import (
        HuggingFaceStorageReader,
        HuggingFaceStorageWriter,
    )

    began = time.perf_counter()
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    state_dict_saver.save(state, storage_writer=writer, no_dist=True)
    for path in folder.iterdir():  # DCP does not fsync its files
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    saved = time.perf_counter()
    # A whole tensor: DCP cannot load a part of a plain tensor.
    reader = HuggingFaceStorageReader(str(folder))
    state_dict_loader.load(state, storage_reader=reader, no_dist=True)
    return saved - began, time.perf_counter() - saved


def measure(way: str, gib: float, folder: str) -> None:
    """Measures one way; runs in a process of its own and prints JSON."""
    state = slices(gib)
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        before = peak_gib()
        save_s, load_s = {"ours": ours, "dcp": dcp}[way](state, Path(name))
        print(json.dumps({"save_s": save_s, "load_s": load_s, "extra_gib": peak_gib() - before}))


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument(
        "--folder", default=str(ROOT / "runs"), help="folder on the disk to measure"
    )
    parser.add_argument("--way", choices=["ours", "dcp"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.way:
        measure(given.way, given.gib, given.folder)
        return 0
    rows = []
    for way, name in (("ours", "rank files"), ("dcp", "DCP, HuggingFaceStorageWriter")):
        command = [sys.executable, __file__, "--way", way]
        options = ["--gib", str(given.gib), "--folder", given.folder]
        done = subprocess.run([*command, *options], stdout=subprocess.PIPE, check=True)
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        rows.append([name, *(f"{found[key]:.2f}" for key in ("extra_gib", "save_s", "load_s"))])
    header = [f"{given.gib:g} GiB", "further memory, GiB", "save, s", "load, s"]
    print(record.markdown(header, rows) + "\n" + record.in_words(record.environment()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
