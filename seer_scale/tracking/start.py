"""Starts the tracking of a run: settings, environment and a sender process."""

from __future__ import annotations

import platform
import subprocess
import sys
import uuid
import warnings
from importlib.metadata import distributions
from pathlib import Path

from seer_scale.tracking.children import package_environment
from seer_scale.tracking.context import context
from seer_scale.tracking.spool import SETTINGS, Tracker, read_json, write_json
from seer_scale.tracking.uri import environment, redact, resolve_uri

ENVIRONMENT = "environment.txt"
LOG = "sender.log"


def start_tracking(
    run_dir: Path | str,
    *,
    uri: str | None,
    experiment: str,
    registered_name: str,
    run_name: str,
    system_metrics: bool,
    first_step: int = 0,
    drain_s: float = 60.0,
) -> Tracker:
    """Opens the spool of `run_dir` and starts a detached process that sends it to MLflow.

    Only rank 0 calls this. The same folder continues the same MLflow run; a new `uri` gets the
    whole spool, as a new run.

    A process that goes back to an older step sends new values for the repeated steps. MLflow then
    holds two points for such a step; the later timestamp belongs to the new attempt.

    Args:
        run_dir: the run's folder.
        uri: MLflow server or database; see `resolve_uri`.
        experiment: name of the MLflow experiment.
        registered_name: name under which `log_model` registers.
        run_name: shown by MLflow.
        system_metrics: also record processor, memory and GPU figures of this node.
        first_step: the step that this process continues from, whose values are sent already; 0 for
            a new run.
        drain_s: how long the sender goes on after the run without any progress.

    Raises:
        ConfigError: if `uri` is none that MLflow can use.
    """
    full_uri = resolve_uri(uri)
    tracker = Tracker(run_dir)
    settings = tracker.folder / SETTINGS
    values = {
        # Finds the run again on the server if the sender dies before it has written down its id.
        "id": read_json(settings).get("id") or uuid.uuid4().hex,
        "uri": redact(full_uri),
        "experiment": experiment,
        "registered_name": registered_name,
        "run_name": run_name,
        "system_metrics": system_metrics,
    }
    write_json(settings, values)
    installed = tracker.folder / ENVIRONMENT
    installed.write_text(_environment())
    tracker.start(run_name, first_step)
    tracker.set_tags(context())
    tracker.log_artifact(installed)
    _start_sender(tracker, full_uri, drain_s)
    return tracker


def _start_sender(tracker: Tracker, uri: str, drain_s: float) -> None:
    command = [sys.executable, "-P", "-m", "seer_scale.tracking.sender", str(tracker.run_dir)]
    with (tracker.folder / LOG).open("ab") as log:
        try:
            # This process forks the sender and returns: launchers that end a process tree
            # do not find the sender in it.
            subprocess.run(
                [*command, "--drain", str(drain_s)],
                env={**package_environment(), **environment(uri)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                timeout=60,
                check=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            warnings.warn(
                f"no process sends this run to MLflow ({redact(str(error))}, see {log.name}); "
                f"`seer-scale sync {tracker.run_dir}` does it later",
                stacklevel=3,
            )


def _environment() -> str:
    packages = sorted(
        {f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower
    )
    head = [f"# python {platform.python_version()}", f"# {platform.platform()}"]
    return "\n".join([*head, *packages]) + "\n"
