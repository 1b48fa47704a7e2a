"""The spool: what a run wants to tell MLflow, one JSON object a line, in the run's own folder.

The training process only ever appends to this file. A sender (another process, or `seer-scale sync`
later) reads it, so no server that is down, slow or wrong can stop or slow the training.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seer_scale.tracking.lock import holder, mark_as_written
from seer_scale.tracking.uri import redact

FOLDER = "tracking"
SPOOL = "spool.jsonl"
SETTINGS = "settings.json"
SENT = "sent.json"
FAILING = "failing.json"  # there while the server does not answer
RETRY_S = 2.0


@dataclass(frozen=True)
class Event:
    """One line of the spool; `offset` and `end` are its byte positions."""

    offset: int
    end: int
    fields: dict[str, Any]

    @property
    def kind(self) -> str:
        """What is told: start, params, metrics, tags, artifact, model, finish or unreadable."""
        return str(self.fields.get("kind", "unreadable"))


def model_outbox(folder: Path, step: int) -> Path:
    """Where `<run_dir>/tracking` keeps the model of `step` until it is sent."""
    return folder / "models" / f"step_{step:08d}" / "trunk"


def checkpoint_outbox(folder: Path, step: int) -> Path:
    """Where `<run_dir>/tracking` keeps the copied checkpoint of `step` until it is sent."""
    return folder / "checkpoints" / f"step_{step:08d}"


def read_events(spool: Path, offset: int) -> Iterator[Event]:
    """The whole lines from byte `offset` on; a line still being written is left for later."""
    if not spool.exists():
        return
    with spool.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):
                return
            try:
                fields = json.loads(line)
            except ValueError:
                fields = {"kind": "unreadable"}
            yield Event(offset, offset + len(line), fields)
            offset += len(line)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replaces `path` in one step: a reader sees the old or the new value, never a part."""
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    fresh.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(fresh, path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; empty if there is none."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value


class Tracker:
    """Rank 0's side of tracking: a call appends a line, which takes microseconds.

    Only `log_model` takes longer: it also links the model's files, or copies them where the file
    system has no links. A spool that cannot be written (a full disk) costs a warning and the
    record, not the run.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir).resolve()
        self.folder = self.run_dir / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = _now()
        self._file = (self.folder / SPOOL).open("ab", buffering=0)
        mark_as_written(self._file)
        self._warned = False
        # A process killed in mid-write leaves half a line; it must not swallow the next one.
        self._torn = not _ends_with_newline(self.folder / SPOOL)

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, once a sender has created it."""
        sent, settings = read_json(self.folder / SENT), read_json(self.folder / SETTINGS)
        return sent.get("run_id") if sent.get("uri") == settings.get("uri") else None

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """`run_id`, waiting up to `timeout_s` for it, or until the server has failed once."""
        deadline = time.monotonic() + timeout_s
        while (run_id := self.run_id) is None and time.monotonic() < deadline:
            if self._server_fails():
                break
            time.sleep(0.1)
        return run_id

    def start(self, run_name: str, step: int = 0) -> None:
        """Says that a process begins this run, or continues it after `step`."""
        self._append("start", run_name=run_name, step=step, time=_now())

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Parameters of the run; of a resumed run, those that changed become tags."""
        self._append("params", params={key: redact(str(value)) for key, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Values at `step`; numbers or 0-d tensors, not finite ones too."""
        values = {key: float(value) for key, value in metrics.items()}
        self._append("metrics", step=step, time=_now(), metrics=values)

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """A file, as it is when it gets sent, into `folder` of the run's artifacts."""
        self._append("artifact", path=self._relative(path), folder=folder)

    def log_model(
        self,
        folder: Path | str,
        *,
        step: int,
        tags: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """A trunk that `serving.export_trunk` wrote to `folder`: logged, registered, tagged.

        MLflow itself resolves the alias `latest` to the newest version; `aliases` are others.
        """
        tags = {key: str(value) for key, value in (tags or {}).items()}
        path, time_ms = self._relative(folder), _now()
        try:
            # The checkpoint may be pruned before its turn comes; links cost no space until then.
            outbox = model_outbox(self.folder, step)
            shutil.copytree(folder, outbox, copy_function=_link, dirs_exist_ok=True)
        except OSError as error:
            warnings.warn(f"{folder} may be gone before it is sent: {error}", stacklevel=2)
        self._append("model", path=path, step=step, tags=tags, aliases=list(aliases), time=time_ms)

    def log_checkpoint(self, folder: Path | str, *, step: int, how: str) -> None:
        """A whole checkpoint: its path (`reference`), its files (`copy`) or nothing (`none`).

        A copy is made of the files' links, so the checkpoint may be pruned before its turn comes.
        """
        if how == "none":
            return
        path, outbox = Path(folder).resolve(), checkpoint_outbox(self.folder, step)
        if how == "copy":
            try:
                shutil.copytree(path, outbox, copy_function=_link, dirs_exist_ok=True)
            except OSError as error:
                warnings.warn(f"{folder} may be gone before it is sent: {error}", stacklevel=2)
        self._append("checkpoint", path=str(path), step=step, how=how)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Tags of the run; a later value replaces an earlier one."""
        self._append("tags", tags={key: redact(str(value)) for key, value in tags.items()})

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self._append("finish", status=status, time=_now())

    def close(self, status: str = "FINISHED", wait_s: float = 30.0) -> bool:
        """Ends the run and waits, at most `wait_s`, until all of it was sent.

        A server that is failing gets one more attempt of `RETRY_S` seconds and no further wait.

        Returns:
            Whether it was; otherwise the sender goes on a while, and `seer-scale sync` sends the
            rest at any time.
        """
        if self._file.closed:
            return self.all_sent()
        self.finish(status)
        began = time.monotonic()
        while not self.all_sent() and self.sender_alive():
            waited = time.monotonic() - began
            if waited >= (min(wait_s, RETRY_S) if self._server_fails() else wait_s):
                break
            time.sleep(0.1)
        self._file.close()
        return self.all_sent()

    def all_sent(self) -> bool:
        """Whether a sender has acknowledged the last line of the spool."""
        offset: int = read_json(self.folder / SENT).get("offset", 0)
        return self.run_id is not None and offset >= (self.folder / SPOOL).stat().st_size

    def sender_alive(self) -> bool:
        """Whether some process is sending this spool, or waits to."""
        return holder(self.folder) is not None

    def _server_fails(self) -> bool:
        """Whether the last attempt to send failed; one before this process began says nothing."""
        failing, settings = read_json(self.folder / FAILING), read_json(self.folder / SETTINGS)
        since: int = failing.get("time", 0)
        return since >= self._began and failing.get("uri") == settings.get("uri")

    def _append(self, kind: str, **fields: Any) -> None:
        line = json.dumps({"kind": kind, **fields}).encode() + b"\n"
        if self._torn:
            line = b"\n" + line
        try:
            self._torn = self._file.write(line) != len(line)
        except OSError as error:
            self._torn = True
            if not self._warned:
                warnings.warn(f"tracking records are lost: {error}", stacklevel=3)
            self._warned = True

    def _relative(self, path: Path | str) -> str:
        absolute = Path(path).resolve()
        inside = absolute.is_relative_to(self.run_dir)
        return str(absolute.relative_to(self.run_dir) if inside else absolute)


class NullTracker:
    """Tracking switched off, or a rank other than 0: the same verbs, no effect."""

    run_id: str | None = None

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """None, at once."""
        return None

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Does nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Does nothing."""

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """Does nothing."""

    def log_model(
        self,
        folder: Path | str,
        *,
        step: int,
        tags: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Does nothing."""

    def log_checkpoint(self, folder: Path | str, *, step: int, how: str) -> None:
        """Does nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Does nothing."""

    def finish(self, status: str = "FINISHED") -> None:
        """Does nothing."""

    def close(self, status: str = "FINISHED", wait_s: float = 30.0) -> bool:
        """True: nothing is left to send."""
        return True


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        if not file.seek(0, os.SEEK_END):
            return True
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
