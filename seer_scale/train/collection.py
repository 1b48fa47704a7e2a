"""The collection of images that a run trains on, and its refreshes during the run.

SEER's images expire and are replaced (see docs/paper.md); here a manifest of shards is read again
from time to time. Rank 0 reads the manifest, and all ranks switch at the same position of the
stream. Every reading is recorded in the run folder with the shards that it found, and a checkpoint
holds the version in use. A resumed run repeats the recorded switches, and reads the manifest again
only after the last of them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from seer_scale import distributed
from seer_scale.data import Cache, Shard, Source
from seer_scale.data import shard_manifest as manifests
from seer_scale.data.shard_collections import open_shards
from seer_scale.data.tars import TarShards
from seer_scale.errors import CheckpointError, DataError

FOLDER = "manifests"
RECORD = "refreshes.jsonl"


@dataclass(frozen=True)
class InUse:
    """Version of the collection in use, as a checkpoint holds it.

    Attributes:
        version: version of the collection.
        origin: position of the stream from which the version is in use; its first epoch begins
            there.
    """

    version: str
    origin: int


@dataclass(frozen=True)
class Reading:
    """A line of refreshes.jsonl.

    Attributes:
        samples_seen: position of the stream at which the manifest was read.
        version: version of the collection from that position on.
        unix_time: time of the reading, in seconds since 1970.
        shards: number of shards.
        images: number of images.
    """

    samples_seen: int
    version: str
    unix_time: float
    shards: int
    images: int


class Collection:
    """Holds the source in use; every rank has one and calls the same methods.

    Args:
        source: source opened from `path`.
        path: `data.path`.
        cache: cache for copies of remote shards, or None.
        run_dir: run folder, where readings are recorded.
        refresh: steps or hours between two readings of the manifest; None for one reading.
        max_age_days: with `refresh`, shards that were published longer ago are dropped.
        saved: collection in the checkpoint from which the run resumes, or None.
        saved_run: run folder of that checkpoint.
        cursor: position of the stream at which the run begins.
        say: tells the user something, on rank 0.

    Attributes:
        source: source in use.
        in_use: version of the collection in use.

    Raises:
        DataError: if `refresh` is given and `path` is not a manifest, or every shard is too old.
        CheckpointError: if the shards of the checkpoint's version are no longer known.
    """

    def __init__(
        self,
        source: Source,
        *,
        path: str,
        cache: Cache | None,
        run_dir: Path,
        refresh: tuple[int, Literal["steps", "hours"]] | None,
        max_age_days: int | None,
        saved: InUse | None,
        saved_run: Path,
        cursor: int,
        say: Callable[[str], None],
    ) -> None:
        self._path, self._cache, self._run_dir, self._say = path, cache, run_dir, say
        self._refresh, self._max_age_days = refresh, max_age_days if refresh else None
        self.source = source
        self._is_manifest = manifests.is_manifest(path)
        if refresh and not self._is_manifest:
            raise DataError(
                f"data.refresh is given, but data.path={path} is not a manifest of shards: give a "
                ".jsonl or .parquet file, or set data.refresh=null"
            )
        self._recorded = self._read_record(saved_run, saved, cursor)  # on rank 0; oldest first
        self.in_use = self._begin(saved, saved_run, cursor)
        self._last_read = time.monotonic()

    def due(self, step: int, cursor: int) -> bool:
        """Whether rank 0 wants the manifest read after `step`; False on other ranks."""
        if self._refresh is None or not distributed.is_main():
            return False
        if self._turns(cursor):
            return True
        every, unit = self._refresh
        if unit == "steps":
            return step % every == 0
        if self._recorded:
            return False  # the recorded readings come first
        return time.monotonic() - self._last_read >= 3600 * every

    def refresh(self, cursor: int) -> bool:
        """Reads the manifest, or repeats a recorded switch; every rank calls at the same `cursor`.

        If the manifest is empty or cannot be read, the present collection stays, with a warning.

        Returns:
            Whether the source has changed.
        """
        shards = None
        if distributed.is_main():
            turns = self._turns(cursor)
            try:
                if turns:
                    shards = self._load(self._run_dir, turns[-1].version)
                else:
                    shards = self._read_manifest()
                    self._record(shards, cursor)
            except (DataError, CheckpointError, OSError) as error:
                self._say(f"warning: {error}; the collection stays as it is")
                if not turns:
                    self._note(self.in_use.version, self.source.shard_sizes.tolist(), cursor)
            self._recorded = [reading for reading in self._recorded if reading not in turns]
            self._last_read = time.monotonic()
        shards = distributed.broadcast_object(shards)
        if shards is None or manifests.version_of(shards) == self.in_use.version:
            return False
        self._use(shards, cursor)
        self._say(
            f"from sample {cursor} on the collection is version {self.in_use.version}: "
            f"{len(shards)} shards, {len(self.source)} images"
        )
        return True

    # ------------------------------------------------------------------------------- the beginning

    def _begin(self, saved: InUse | None, saved_run: Path, cursor: int) -> InUse:
        if not self._is_manifest:
            if saved and saved.version == self.source.version:
                return saved
            if saved:
                self._say(
                    f"warning: data.path={self._path} holds other images than when the checkpoint "
                    f"was written: an epoch of {len(self.source)} images begins here"
                )
            return InUse(self.source.version, cursor)
        problem, shards = None, None
        if distributed.is_main():
            try:
                if saved:
                    shards = self._load(saved_run, saved.version)
                    self._keep(shards)
                else:
                    shards = self._young(self._opened_shards())
                    self._record(shards, cursor)
            except (DataError, CheckpointError, OSError) as error:
                problem = str(error)
        problem, shards = distributed.broadcast_object((problem, shards))
        if shards is None:
            raise DataError(str(problem))
        self._use(shards, saved.origin if saved else cursor)
        return self.in_use

    def _use(self, shards: list[Shard], origin: int) -> None:
        self.source = open_shards(shards, self._cache)
        self.in_use = InUse(manifests.version_of(shards), origin)

    def _opened_shards(self) -> list[Shard]:
        """Returns the shards that were read when the manifest was opened."""
        assert isinstance(self.source, TarShards)  # every manifest is opened as tar shards
        return self.source.shards

    def _read_manifest(self) -> list[Shard]:
        return self._young(manifests.read_shards(self._path))

    def _young(self, shards: list[Shard]) -> list[Shard]:
        if self._max_age_days is None:
            return shards
        young = manifests.drop_old(shards, datetime.now(UTC), self._max_age_days)
        if not young:
            limit = datetime.now(UTC) - timedelta(days=self._max_age_days)
            raise DataError(
                f"data.path={self._path} names {len(shards)} shards, none of them published "
                f"after {limit:%Y-%m-%d} (data.max_age_days={self._max_age_days})"
            )
        return young

    # ------------------------------------------------------------------------------- the record

    def _turns(self, cursor: int) -> list[Reading]:
        return [reading for reading in self._recorded if reading.samples_seen <= cursor]

    def _read_record(self, saved_run: Path, saved: InUse | None, cursor: int) -> list[Reading]:
        """Reads the switches after `cursor` that the run made earlier; a new run has none."""
        if not distributed.is_main():
            return []
        path = self._run_dir / RECORD
        if saved is None:
            path.unlink(missing_ok=True)
            return []
        if saved_run.resolve() != self._run_dir.resolve():
            return []
        lines: list[dict[str, Any]] = []
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                lines.append(json.loads(line))
            except ValueError:  # the run was killed while it wrote this line
                break
        return [entry for line in lines if (entry := Reading(**line)).samples_seen > cursor]

    def _record(self, shards: list[Shard], cursor: int) -> None:
        self._note(self._keep(shards), [shard.count for shard in shards], cursor)

    def _note(self, version: str, counts: list[int], cursor: int) -> None:
        reading = Reading(cursor, version, time.time(), len(counts), sum(counts))
        with (self._run_dir / RECORD).open("a") as file:
            file.write(json.dumps(asdict(reading)) + "\n")

    def _keep(self, shards: list[Shard]) -> str:
        """Writes the shards to the run folder, and returns their version, which names the file."""
        version = manifests.version_of(shards)
        path = self._run_dir / FOLDER / f"{version}.jsonl"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            manifests.write_shards(str(path), shards)
        return version

    def _load(self, run_dir: Path, version: str) -> list[Shard]:
        path = run_dir / FOLDER / f"{version}.jsonl"
        shards = manifests.read_shards(str(path)) if path.exists() else self._read_manifest()
        if manifests.version_of(shards) != version:
            raise CheckpointError(
                f"the checkpoint was made with version {version} of the collection, but neither "
                f"{path} nor data.path={self._path} holds that version now: restore the file, or "
                "start a new run from the checkpoint's trunk"
            )
        return shards
