"""Delivers a run's spool to MLflow, request by request, from where the last sender stopped.

After every request the acknowledged byte offset is written down beside the run's id.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.refusals import COUNT, count_refusals, keep_refusal
from seer_scale.tracking.spool import (
    FAILING,
    SENT,
    SETTINGS,
    SPOOL,
    Event,
    checkpoint_outbox,
    model_outbox,
    read_events,
    read_json,
    write_json,
)
from seer_scale.tracking.uri import environment, one_line, redact

if TYPE_CHECKING:
    from seer_scale.tracking.mlflow_client import MlflowRun

METRICS_PER_REQUEST = 1000
REFUSALS = 5


class Unreachable(Exception):  # noqa: N818  (a state of the server, not a mistake)
    """The server does not answer, or refuses this run; unsent events stay in the spool."""


class Delivery:
    """Delivery of one run's spool to one server.

    Args:
        folder: `<run_dir>/tracking`.
        uri: with credentials; another than before starts again at the spool's first line.
    """

    def __init__(self, folder: Path, uri: str) -> None:
        self.folder = folder
        self.settings = read_json(folder / SETTINGS)
        self.uri = uri
        sent = read_json(folder / SENT)
        if sent.get("uri") != redact(uri):
            sent = {"uri": redact(uri), "run_id": None, "offset": 0, "steps": {}}
        sent[COUNT] = count_refusals(sent, folder)
        self.sent = sent
        self._scratch = folder / "scratch"
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._alone_until = 0
        self._refusals = 0
        self._run: MlflowRun | None = None

    @property
    def run(self) -> MlflowRun:
        """The MLflow run; the first use imports mlflow, which takes seconds."""
        if self._run is None:
            os.environ.update(environment(self.uri))
            quieten()
            from seer_scale.tracking.mlflow_client import MlflowRun

            self._run = MlflowRun(
                os.environ["MLFLOW_TRACKING_URI"],
                experiment=self.settings["experiment"],
                registered_name=self.settings["registered_name"],
                spool_id=self.settings["id"],
                run_id=self.sent["run_id"],
                scratch=self._scratch,
            )
        return self._run

    def step(self) -> list[Event]:
        """Sends the next request and returns its events; none if everything was sent.

        Raises:
            Unreachable: if they could not be sent now.
        """
        events = self._next()
        if not events:
            return []
        try:
            self._deliver(events)
        except Exception as error:
            self._refused(events, error)
            return events if self.sent["offset"] >= events[-1].end else self.step()
        self._acknowledge(events)
        return events

    @property
    def rejected(self) -> int:
        """Number of events that this server refused for good, of all senders of this run."""
        return int(self.sent[COUNT])

    def left(self) -> int:
        """Number of events still to be sent."""
        return sum(1 for _ in read_events(self.folder / SPOOL, self.sent["offset"]))

    def _next(self) -> list[Event]:
        """One event, or as many successive metrics as one request takes."""
        chosen: list[Event] = []
        count = 0
        for event in read_events(self.folder / SPOOL, self.sent["offset"]):
            count += len(event.fields.get("metrics", ()))
            if chosen and (event.kind != "metrics" or count > METRICS_PER_REQUEST):
                break
            chosen.append(event)
            if event.kind != "metrics" or event.end <= self._alone_until:
                break
        return chosen

    def _deliver(self, events: list[Event]) -> None:
        fields = events[0].fields
        if self.run.run_id is None or events[0].kind == "start":
            now = time.time_ns() // 1_000_000
            name = fields.get("run_name", self.settings["run_name"])
            self.sent["run_id"] = self.run.open(name, fields.get("time", now))
            write_json(self.folder / SENT, self.sent)
        match events[0].kind:
            case "start":
                pass
            case "params":
                self.run.log_params(fields["params"])
            case "metrics":
                self.run.log_metrics(
                    (key, value, event.fields["time"], event.fields["step"])
                    for event in events
                    for key, value in event.fields["metrics"].items()
                    # What a resumed run had sent before the step it goes on from stays as it is.
                    if event.fields["step"] > self.sent["steps"].get(key, -1)
                )
            case "tags":
                self.run.set_tags(fields["tags"])
            case "dataset":
                self.run.log_dataset(**fields["dataset"])
            case "artifact":
                self.run.log_artifact(self._path(fields["path"]), fields["folder"])
            case "model":
                outbox = model_outbox(self.folder, fields["step"])
                number = self.run.log_model(
                    outbox if outbox.is_dir() else self._path(fields["path"]),
                    step=fields["step"],
                    tags=fields["tags"],
                    aliases=fields["aliases"],
                )
                self.sent["version"] = {"step": fields["step"], "number": number}
            case "checkpoint":
                outbox = checkpoint_outbox(self.folder, fields["step"])
                if fields["how"] == "copy":
                    self.run.log_artifact(
                        outbox if outbox.is_dir() else self._path(fields["path"]),
                        f"checkpoints/step_{fields['step']:08d}",
                    )
                else:
                    self.run.log_reference(fields["path"], fields["step"])
            case "finish":
                self.run.finish(fields["status"], fields["time"])
            case kind:
                raise ValueError(f"this line of the spool is {kind}")

    def _refused(self, events: list[Event], error: Exception) -> None:
        """Reacts to a refusal: waits, sends events one by one, or gives up one event."""
        reason, verdict = one_line(error), _refusal(error)
        if verdict == "no" or self._run is None or not self._run.answers():
            if self._run is not None and verdict != "no" and self._run.run_id is not None:
                reason = self._run.deletion() or reason
            self._mark_as_failing(reason)
            raise Unreachable(reason)
        if len(events) > 1:
            self._alone_until = events[-1].end
            return
        self._refusals += 1
        if verdict == "maybe" and self._refusals < REFUSALS:
            raise Unreachable(reason)
        line = {"offset": events[0].offset, "reason": reason, "event": events[0].fields}
        keep_refusal(self.folder, {**line, "uri": self.sent["uri"]})
        self.sent[COUNT] += 1
        self._acknowledge(events)

    def _acknowledge(self, events: list[Event]) -> None:
        self._refusals = 0
        (self.folder / FAILING).unlink(missing_ok=True)
        if events[0].kind == "start":
            # Who resumes from an older step says anew what came after it.
            steps, first = self.sent["steps"], events[0].fields.get("step")
            if first is not None:
                self.sent["steps"] = {key: min(step, first) for key, step in steps.items()}
        for event in events:
            for key in event.fields.get("metrics", ()):
                before = self.sent["steps"].get(key, -1)
                self.sent["steps"][key] = max(before, event.fields["step"])
        self.sent["offset"] = events[-1].end
        write_json(self.folder / SENT, self.sent)
        if events[0].kind == "model":
            outbox = model_outbox(self.folder, events[0].fields["step"])
            shutil.rmtree(outbox.parent, ignore_errors=True)
        if events[0].kind == "checkpoint":
            outbox = checkpoint_outbox(self.folder, events[0].fields["step"])
            shutil.rmtree(outbox, ignore_errors=True)

    def _mark_as_failing(self, reason: str) -> None:
        """Tells the training process not to wait for this server."""
        mark = {"uri": self.sent["uri"], "time": time.time_ns() // 1_000_000, "reason": reason}
        with contextlib.suppress(OSError):  # a full disk
            write_json(self.folder / FAILING, mark)

    def _path(self, path: str) -> Path:
        return self.folder.parent / path


def _refusal(error: Exception) -> Literal["lasting", "maybe", "no"]:
    """Tells whether the server refused the content, or the connection failed ("no")."""
    status = getattr(error, "get_http_status_code", None)  # MLflow's exceptions have it
    if status is not None:
        if status() == 400:
            return "lasting"
        return "maybe" if status() in (404, 409, 500) else "no"
    local = (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError)
    return "lasting" if isinstance(error, local) else "maybe"
