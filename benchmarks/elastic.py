"""Measures losses after a resume under another strategy and another number of ranks.

    python benchmarks/elastic.py [--all] [--write]

Trains on CPU with the trainer and SwAV's queue; a run stops at step 7 and resumes. Its losses of
steps 8 to 20 are compared with two runs without interruption: one as the run began, one as it
ended. `--write` puts the results into benchmarks/results/ and docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402
from harness.jobs import arguments, losses, run_job, write_images  # noqa: E402
from harness.pool import Pool  # noqa: E402

STEPS, STOP, BATCH = 20, 7, 8
SECONDS = 3600  # four ranks share the cores of the machine
TOLERANCE = 1e-4
ZERO = {
    f"zero{n}": ["--deepspeed_config", str(ROOT / "ds_configs" / f"zero{n}.json")]
    for n in (1, 2, 3)
}
STRATEGIES = {"ddp": [], "fsdp": ["sharding.strategy=fsdp"], **ZERO}
CHANGES = [(1, 2), (2, 1), (2, 4), (4, 2)]
Place = tuple[str, int]  # strategy, number of ranks


class Matrix:
    """Runs trainings in pools of processes and remembers the uninterrupted ones."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = write_images(folder / "images")
        self._pools: dict[int, Pool] = {}
        self._whole: dict[Place, Path] = {}

    def whole(self, place: Place) -> Path:
        """Folder of a run from step 0 to the end, with a checkpoint of step 7."""
        if place not in self._whole:
            self._whole[place] = self._train(place, f"{place[0]}_{place[1]}", [])
        return self._whole[place]

    def resumed(self, start: Place, end: Place) -> list[float]:
        """Losses of steps 8 to 20 after a change of strategy and number of ranks."""
        checkpoint = self.whole(start) / "checkpoints" / f"step_{STOP:08d}"
        name = f"{start[0]}_{start[1]}_to_{end[0]}_{end[1]}"
        return losses(self._train(end, name, ["--resume", str(checkpoint)]))

    def difference(self, start: Place, end: Place) -> float:
        """Largest relative difference of a loss from either uninterrupted run."""
        found = self.resumed(start, end)
        return max(worst(found, losses(self.whole(place))[STOP:]) for place in (start, end))

    def close(self) -> None:
        """Ends all processes."""
        for pool in self._pools.values():
            pool.close()

    def _train(self, place: Place, name: str, more: list[str]) -> Path:
        strategy, world_size = place
        run_dir = self.folder / name
        argv = arguments(
            self.images,
            run_dir,
            *(f"train.steps={STEPS}", f"train.micro_batch_size={BATCH // world_size}"),
            *(f"checkpoint.every={STOP}", "checkpoint.keep=9", "objective.queue_length=16"),
            # A low learning rate: at a high one, differences by rounding grow without bound.
            *("optim.base_lr=0.05", "model.head_batch_norm=true"),
            *STRATEGIES[strategy],
            *more,
        )
        if world_size not in self._pools:
            self._pools[world_size] = Pool(world_size)
        began = time.monotonic()
        self._pools[world_size].run(run_job, argv, seconds=SECONDS)
        print(f"{name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        return run_dir


def worst(actual: list[float], expected: list[float]) -> float:
    """Largest relative difference of two equally long lists."""
    pairs = zip(actual, expected, strict=True)
    return max(abs(a - b) / abs(b) for a, b in pairs)


def changes(strategies: list[str], everything: bool) -> list[tuple[Place, Place]]:
    """Pairs of strategies with changes of the number of ranks: all, or one change for each pair."""
    pairs = list(itertools.product(strategies, strategies))
    if everything:
        return [((a, m), (b, n)) for a, b in pairs for m, n in CHANGES]
    chosen = []
    for index, (a, b) in enumerate(pairs):
        # Diagonally, so that every strategy is resumed from and into every number of ranks.
        m, n = CHANGES[(index + index // len(strategies)) % len(CHANGES)]
        chosen.append(((a, m), (b, n)))
    return chosen


def main() -> int:
    """Prints the table; returns 1 if a cell is beyond the tolerance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--all", action="store_true", help="every pair under every change of ranks")
    parser.add_argument("--write", action="store_true", help="write into docs/checkpoints.md")
    arguments_ = parser.parse_args()
    strategies = arguments_.strategies.split(",")
    cells: dict[Place, list[str]] = {}
    found: list[dict[str, Any]] = []
    failed = 0
    with tempfile.TemporaryDirectory() as folder, closing(Matrix(Path(folder))) as matrix:
        for start, end in changes(strategies, arguments_.all):
            difference = matrix.difference(start, end)
            failed += difference > TOLERANCE
            found.append({"start": start, "end": end, "difference": difference})
            cells.setdefault((start[0], 0), []).append(f"{start[1]}→{end[1]} {difference:.0e}")
        exact = []
        for strategy, world_size in itertools.product(strategies, (1, 2, 4)):
            place = (strategy, world_size)
            same = matrix.resumed(place, place) == losses(matrix.whole(place))[STOP:]
            failed += not same
            found.append({"start": place, "end": place, "bit_for_bit": same})
            exact.append([strategy, world_size, "equal" if same else "DIFFERENT"])
    per_pair = len(CHANGES) if arguments_.all else 1
    rows = [
        [name, *(", ".join(texts[i : i + per_pair]) for i in range(0, len(texts), per_pair))]
        for (name, _), texts in cells.items()
    ]
    table = record.markdown(["from \\ to", *strategies], rows)
    unchanged = record.markdown(["strategy", "ranks", "losses of steps 8 to 20"], exact)
    text = f"{table}\n{unchanged}\n{record.in_words(record.environment())}"
    print(text)
    if arguments_.write:
        record.save("elastic", "python benchmarks/elastic.py", {"cells": found})
        record.put_into(ROOT / "docs" / "checkpoints.md", "elastic", text)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
