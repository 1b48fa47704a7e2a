"""The spool: events for MLflow in the run's own folder, one JSON object per line.

The training process only appends to this file. A sender (another process, or `seer-scale sync`
later) reads the file, so a slow, broken or dead server cannot stop or slow the training.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path
from typing import Any

from seer_scale.storage.atomic import replaced_file
from seer_scale.tracking.lock import holder, mark_as_written
from seer_scale.tracking.refusals import refusals
from seer_scale.tracking.uri import redact

FOLDER = "tracking"
SPOOL = "spool.jsonl"
SETTINGS = "settings.json"
SENT = "sent.json"
FAILING = "failing.json"  # there while the server does not answer
RETRY_S = 2.0
_TAIL = 4096  # bytes that are read at a time from the end


@dataclass(frozen=True)
class Event:
    """One line of the spool; `offset` and `end` are its byte positions."""

    offset: int
    end: int
    fields: dict[str, Any]

    @property
    def kind(self) -> str:
        """Kind: start, params, metrics, tags, dataset, artifact, model, finish or unreadable."""
        return str(self.fields.get("kind", "unreadable"))


def model_outbox(folder: Path, step: int) -> Path:
    """Folder in `<run_dir>/tracking` of the model of `step`, until the model is sent."""
    return folder / "models" / f"step_{step:08d}" / "trunk"


def checkpoint_outbox(folder: Path, step: int) -> Path:
    """Folder in `<run_dir>/tracking` of the copied checkpoint of `step`, until it is sent."""
    return folder / "checkpoints" / f"step_{step:08d}"


def read_events(spool: Path, offset: int) -> Iterator[Event]:
    """Reads the whole lines from byte `offset` on, without a line that is still being written."""
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
    with replaced_file(path, writers=2) as fresh:
        fresh.write_text(json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads the object in `path`; empty without a file."""
    try:
        value: dict[str, Any] = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return value


def version_of(run_dir: Path, step: int) -> str | None:
    """Number of the registered version of a run's trunk of `step`; None until it is sent."""
    newest: dict[str, Any] = read_json(run_dir / FOLDER / SENT).get("version", {})
    return newest["number"] if newest.get("step") == step else None


def end_of(folder: Path) -> str | None:
    """Status with which the run of a spool ended; None while it goes on, or if it was killed."""
    try:
        with (folder / SPOOL).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            last = json.loads(file.read().rstrip(b"\n").rsplit(b"\n", 1)[-1])
        return str(last["status"]) if last["kind"] == "finish" else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


class Tracker:
    """Rank 0's side of tracking; a call appends one line, in microseconds.

    Only `log_model` takes longer: it also links the model's files, or copies them if the file
    system has no links. A full disk costs a warning and the record, not the run.
    """

    def __init__(self, run_dir: Path | str) -> None:
        self.run_dir = Path(run_dir).resolve()
        self.folder = self.run_dir / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self._began = _now()
        self._file = (self.folder / SPOOL).open(
            "a+b", buffering=0
        )  # readable: NFS wants that of a lock
        mark_as_written(self._file)
        self._warned = False
        # A process killed in mid-write leaves half a line, which no sender has read.
        self._file.truncate(_end_of_lines(self._file))

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run, once a sender has created it."""
        sent, settings = read_json(self.folder / SENT), read_json(self.folder / SETTINGS)
        return sent.get("run_id") if sent.get("uri") == settings.get("uri") else None

    def wait_for_run_id(self, timeout_s: float) -> str | None:
        """Waits for `run_id`, at most `timeout_s` or until the server has failed once."""
        deadline = time.monotonic() + timeout_s
        while (run_id := self.run_id) is None and time.monotonic() < deadline:
            if self._server_fails():
                break
            time.sleep(0.1)
        return run_id

    def start(self, run_name: str, step: int = 0) -> None:
        """Records that a process begins this run, or continues the run after `step`."""
        self._append("start", run_name=run_name, step=step, time=_now())

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Logs parameters of the run; changed parameters of a resumed run become tags."""
        self._append("params", params={key: redact(str(value)) for key, value in params.items()})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs values at `step`: numbers or 0-d tensors, finite or not."""
        values = {key: float(value) for key, value in metrics.items()}
        self._append("metrics", step=step, time=_now(), metrics=values)

    def log_dataset(self, path: str, *, digest: str, images: int, used_for: str) -> None:
        """Logs a collection of images as an input of the run.

        Args:
            path: local path or address.
            digest: version of the collection.
            images: number of its images.
            used_for: `training` or `validation`.
        """
        about = {"path": redact(path), "digest": digest, "images": images, "used_for": used_for}
        self._append("dataset", dataset=about)

    def log_artifact(self, path: Path | str, folder: str = "") -> None:
        """Logs a file to `folder` of the run's artifacts; the file is read when it is sent."""
        self._append("artifact", path=self._relative(path), folder=folder)

    def log_model(
        self,
        folder: Path | str,
        *,
        step: int,
        tags: Mapping[str, Any] | None = None,
        aliases: Sequence[str] = (),
    ) -> None:
        """Logs, registers and tags a trunk that `serving.export_trunk` wrote to `folder`.

        MLflow itself resolves the alias `latest` to the newest version; `aliases` are further ones.
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
        """Logs a whole checkpoint: its path (`reference`), its files (`copy`) or nothing (`none`).

        A copy links the files, so the checkpoint may be deleted before the copy is sent.
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
        """Sets tags of the run; a later value replaces an earlier one."""
        self._append("tags", tags={key: redact(str(value)) for key, value in tags.items()})

    def finish(self, status: str = "FINISHED") -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""
        self._append("finish", status=status, time=_now())

    def close(self, status: str = "FINISHED", wait_s: float = 30.0) -> bool:
        """Ends the run and waits, at most `wait_s`, until everything is sent.

        A failing server gets one more attempt of `RETRY_S` seconds and no further wait.

        Returns:
            True if everything was sent; otherwise the sender continues for a while, and
            `seer-scale sync` sends the rest at any time.
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
        """Tells whether a sender has acknowledged the last line of the spool."""
        offset: int = read_json(self.folder / SENT).get("offset", 0)
        return self.run_id is not None and offset >= (self.folder / SPOOL).stat().st_size

    def problem(self) -> str | None:
        """Says why the last attempt to send failed; None if it did not, or none was made."""
        return read_json(self.folder / FAILING).get("reason") if self._server_fails() else None

    def refused(self) -> str | None:
        """Says in a sentence what the server refused for good so far; None if nothing."""
        return refusals(read_json(self.folder / SENT), self.folder)

    def sender_alive(self) -> bool:
        """Tells whether a process sends this spool, or waits to send it."""
        return holder(self.folder) is not None

    def _server_fails(self) -> bool:
        """Tells whether the last attempt to send failed, since this process began."""
        failing, settings = read_json(self.folder / FAILING), read_json(self.folder / SETTINGS)
        since: int = failing.get("time", 0)
        return since >= self._began and failing.get("uri") == settings.get("uri")

    def _append(self, kind: str, **fields: Any) -> None:
        line = memoryview(json.dumps({"kind": kind, **fields}).encode() + b"\n")
        end = self._file.seek(0, os.SEEK_END)
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(end)  # half a line must not swallow the next one
            if not self._warned:
                warnings.warn(f"tracking records are lost: {error}", stacklevel=3)
            self._warned = True

    def _relative(self, path: Path | str) -> str:
        absolute = Path(path).resolve()
        inside = absolute.is_relative_to(self.run_dir)
        return str(absolute.relative_to(self.run_dir) if inside else absolute)


def _link(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copy2(source, target)


def _now() -> int:
    return time.time_ns() // 1_000_000


def _end_of_lines(file: RawIOBase) -> int:
    """Finds the position behind the last whole line, from the end: a spool may be large."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - _TAIL)
        file.seek(begin)
        newline = (file.read(end - begin) or b"").rfind(b"\n")
        if newline >= 0:
            return begin + newline + 1
        end = begin
    return 0
