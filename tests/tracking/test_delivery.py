"""Spool to MLflow with the real thing: an embedded database, a real server, real kills.

Every sender is a process that imports mlflow (seconds); the scenarios are few and long for that.
"""

from __future__ import annotations

import base64
import getpass
import io
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from seer_scale.commands import sync
from seer_scale.convert.loading import load
from seer_scale.distributed.ports import free_port
from seer_scale.errors import UserError
from seer_scale.models import build_trunk
from seer_scale.serving import export_trunk
from seer_scale.tracking import Tracker, sender, start_tracking
from seer_scale.tracking.lock import holder
from seer_scale.tracking.quiet import quieten
from seer_scale.tracking.spool import SETTINGS, write_json

pytestmark = [pytest.mark.launch, pytest.mark.long]

ROOT = Path(__file__).parents[2]
SECRET = "correct-horse"


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The sender's code tells mlflow its server through the environment."""
    before = dict(os.environ)
    quieten()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


class Server:
    """A real `mlflow server` that can be killed and started again at the same address."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder
        self.port = port or free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        places = {
            "--host": "127.0.0.1",
            "--port": str(self.port),
            "--backend-store-uri": f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination": str(self.folder / "server-artifacts"),
        }
        with (self.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *(word for pair in places.items() for word in pair)],
                env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self) -> None:
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def uri(self, userinfo: str = "") -> str:
        return f"http://{userinfo}127.0.0.1:{self.port}"

    def healthy(self) -> bool:
        try:
            with urlopen(self.uri() + "/health", timeout=5):
                return True
        except OSError:
            return False


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    running = Server(folder)
    yield running
    running.kill()


@pytest.fixture(scope="module")
def database(folder: Path, server: Server) -> str:
    """The embedded default; the server (another database) starts up in the meantime."""
    return f"sqlite:///{folder}/mlflow.db"


def until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "this took too long"
        time.sleep(0.05)


def start(
    run_dir: Path,
    uri: str,
    *,
    drain_s: float = 60.0,
    system_metrics: bool = False,
    first_step: int = 0,
) -> Tracker:
    return start_tracking(
        run_dir,
        uri=uri,
        experiment="tests",
        registered_name="seer-tests",
        run_name=run_dir.name,
        system_metrics=system_metrics,
        first_step=first_step,
        drain_s=drain_s,
    )


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def history(uri: str, run_id: str, key: str) -> list[tuple[int, float]]:
    """(step, value) of every point on the server, duplicates and all."""
    return sorted((m.step, m.value) for m in client(uri).get_metric_history(run_id, key))


def pickles(folder: Path) -> list[Path]:
    """Files that unpickle: by name, and by the opcode that every pickle since 2003 starts with."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    names = (".pkl", ".pickle", ".pt", ".pth", ".bin")
    return [p for p in files if p.suffix in names or p.read_bytes()[:1] == b"\x80"]


@pytest.fixture(scope="module")
def life(database: str, folder: Path) -> Tracker:
    """A run in the embedded database, from its first line to its last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")
        tracker = start(folder / "life", database, system_metrics=True)
    run_dir = tracker.run_dir
    about = {"digest": "0123456789abcdef", "images": 1234, "used_for": "training"}
    tracker.log_dataset("/data/photographs", **about)  # type: ignore[arg-type]
    tracker.log_params({f"section.key_{i}": i for i in range(150)})
    tracker.log_params({"long": "x" * 7000, "odd name?": 1})
    for step in range(800):
        tracker.log_metrics({"loss": 1 / (step + 1), "lr": 0.1 * step}, step)
    tracker.log_metrics({"loss": math.nan, "lr": math.inf, "odd name?": 1.0}, 800)
    # What the server or the disk refuses for good costs itself only.
    tracker.log_metrics({"/": 1.0, "lost_with_it": 1.0}, 801)
    tracker.log_artifact(run_dir / "never_written.png")
    tracker.log_metrics({"loss": 0.25}, 802)
    (run_dir / "config.yaml").write_text("train:\n")
    tracker.log_artifact(run_dir / "config.yaml", "config")
    torch.manual_seed(0)
    trunk = build_trunk("regnety_debug")
    for step, aliases in ((500, ["best", "latest"]), (800, ["latest"])):
        trunk(torch.randn(4, 3, 64, 64))  # other BatchNorm statistics, so other features
        exported = run_dir / "checkpoints" / f"step_{step:08d}" / "trunk"
        made = {"recipe": "mine", "images": 10 * step + 3000, "objective": "swav"}
        made |= {"crop_sizes": [64, 32], "crop_counts": [2, 4]}
        export_trunk(trunk, exported, trunk="regnety_debug", step=step, pretraining=made)
        tracker.log_model(exported, step=step, tags={"loss": 0.5}, aliases=aliases)
    assert tracker.wait_for_run_id(120)
    time.sleep(3)  # for the system metrics, sampled every second here
    assert tracker.close(wait_s=120)
    return tracker


def test_everything_arrives(life: Tracker, database: str) -> None:
    assert life.run_id is not None
    run = client(database).get_run(life.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "life")
    assert len(client(database).search_runs([run.info.experiment_id])) == 1
    assert len(run.data.params) == 152
    assert run.data.params["section.key_149"] == "149"
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["odd name_"] == "1"
    losses = history(database, life.run_id, "loss")
    assert losses[:800] == [(step, 1 / (step + 1)) for step in range(800)]
    assert [step for step, _ in losses[800:]] == [800, 802]
    assert math.isnan(losses[800][1])
    # MLflow keeps an infinity as the largest float.
    assert history(database, life.run_id, "lr")[-1] == (800, sys.float_info.max)
    assert any(key.startswith("system/") for key in run.data.metrics)
    paths = {item.path for item in client(database).list_artifacts(life.run_id)}
    assert paths == {"environment.txt", "config"}
    environment = (life.folder / "environment.txt").read_text()
    assert f"\ntorch=={version('torch')}\n" in environment


def test_what_is_refused_is_written_down(life: Tracker) -> None:
    lines = (life.folder / "rejected.jsonl").read_text().splitlines()
    refused = [json.loads(line) for line in lines]
    assert [entry["event"]["kind"] for entry in refused] == ["metrics", "artifact"]
    assert "never_written.png is gone" in refused[1]["reason"]


def test_models_are_registered_and_hold_no_pickle(
    life: Tracker, database: str, folder: Path
) -> None:
    registry = client(database)
    newest, best = (
        registry.get_model_version_by_alias("seer-tests", alias) for alias in ("latest", "best")
    )
    assert (str(newest.version), str(best.version)) == ("2", "1")
    assert (best.tags["step"], best.tags["loss"], best.tags["trunk"]) == (
        "500",
        "0.5",
        "regnety_debug",
    )
    assert best.run_id == life.run_id
    model = registry.get_logged_model(newest.source.removeprefix("models:/"))
    assert str(model.status) == "READY"
    assert model.source_run_id == life.run_id
    assert pickles(folder / "mlartifacts") == []
    assert not (life.folder / "scratch").exists() or not any((life.folder / "scratch").iterdir())


def test_a_logged_model_knows_its_versions_as_if_mlflow_had_registered_it(
    life: Tracker, database: str
) -> None:
    import mlflow

    registry = client(database)
    newest = registry.get_model_version_by_alias("seer-tests", "latest")
    model_id = newest.source.removeprefix("models:/")
    ours = json.loads(registry.get_logged_model(model_id).tags["mlflow.modelVersions"])
    mlflow.set_tracking_uri(database)
    try:
        mlflow.register_model(f"models:/{model_id}", "by-mlflow")
    finally:
        mlflow.set_tracking_uri(None)
    theirs = json.loads(registry.get_logged_model(model_id).tags["mlflow.modelVersions"])
    assert theirs == [*ours, {"name": "by-mlflow", "version": ours[0]["version"] - 1}]
    assert ours == [{"name": "seer-tests", "version": newest.version}]


def test_pages_have_user_source_commit_images_and_texts(life: Tracker, database: str) -> None:
    registry, run_id = client(database), str(life.run_id)
    run = registry.get_run(run_id)
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    ).stdout.strip()
    assert run.data.tags["mlflow.user"] == getpass.getuser()
    assert run.data.tags["mlflow.source.name"] == sys.argv[0]
    assert run.data.tags["mlflow.source.git.commit"] == commit
    (used,) = run.inputs.dataset_inputs
    assert (used.dataset.name, used.dataset.digest) == ("photographs", "0123456789abcdef")
    assert json.loads(used.dataset.profile) == {"images": 1234}
    assert [(tag.key, tag.value) for tag in used.tags] == [("mlflow.data.context", "training")]
    import mlflow

    source = mlflow.data.get_source(used)
    assert source.to_dict() == {"uri": "/data/photographs"}
    best = registry.get_model_version_by_alias("seer-tests", "best")
    model = registry.get_logged_model(best.source.removeprefix("models:/"))
    assert model.tags["mlflow.source.git.commit"] == commit
    assert model.tags["mlflow.note.content"] == best.description
    for words in ("`regnety_debug`", "recipe `mine`", "8,000 images seen", "2 x 64", "no k-NN yet"):
        assert words in best.description
    newest = registry.get_model_version_by_alias("seer-tests", "latest")
    whole = registry.get_registered_model("seer-tests").description
    assert newest.description in whole


def test_a_later_evaluation_is_in_the_texts_but_not_in_a_persons(
    life: Tracker, database: str
) -> None:
    from seer_scale.tracking.mlflow_client import log_evaluation

    registry = client(database)

    def evaluate(step: int, top1: float) -> None:
        log_evaluation(
            database,
            run_id=life.run_id,
            experiment="tests",
            run_name="unused",
            params={},
            metrics={"eval/knn/top1": top1},
            step=step,
            files=[],
            folder="evaluation/knn",
            scratch=life.run_dir,
        )

    evaluate(800, 0.5)
    newest = registry.get_model_version_by_alias("seer-tests", "latest")
    best = registry.get_model_version_by_alias("seer-tests", "best")
    assert newest.description.endswith("k-NN top-1 50.00 %.")
    assert "k-NN top-1 50.00 %." in registry.get_registered_model("seer-tests").description
    assert "no k-NN yet" in best.description  # of another step
    registry.update_model_version("seer-tests", str(newest.version), "mine: no k-NN yet")
    registry.update_registered_model("seer-tests", "for the shop")
    evaluate(800, 0.75)
    newest = registry.get_model_version_by_alias("seer-tests", "latest")
    assert newest.description == "mine: no k-NN yet"
    assert registry.get_registered_model("seer-tests").description == "for the shop"


def test_every_way_to_load_gives_the_same_features(life: Tracker, database: str) -> None:
    import mlflow

    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        expected = load(life.run_dir)(images).numpy()
        first = load(life.run_dir / "checkpoints" / "step_00000500")(images).numpy()
        found = {
            name: load(f"models:/seer-tests{name}", tracking_uri=database)(images).numpy()
            for name in ("@latest", "@best", "/2")
        }
    mlflow.set_tracking_uri(database)
    try:
        served = mlflow.pyfunc.load_model("models:/seer-tests@latest")
        with torch.inference_mode():
            found["set_tracking_uri"] = load("models:/seer-tests@latest")(images).numpy()
    finally:
        mlflow.set_tracking_uri(None)
    assert not np.array_equal(expected, first)
    np.testing.assert_array_equal(served.predict(images.numpy()), expected)
    np.testing.assert_array_equal(found.pop("@best"), first)
    for features in found.values():
        np.testing.assert_array_equal(features, expected)
    inputs, outputs = served.metadata.signature.inputs, served.metadata.signature.outputs
    assert inputs.inputs[0].shape == (-1,)  # numbers of any shape, and encoded images
    assert outputs.inputs[0].shape == (-1, expected.shape[1])
    example = served.input_example
    assert served.predict(example).shape == (1, expected.shape[1])
    file = io.BytesIO()
    Image.new("RGB", (90, 60), (200, 60, 40)).save(file, "JPEG")
    by_bytes = served.predict(np.array([file.getvalue()], dtype=object))
    frame = pandas.DataFrame({"image": [base64.b64encode(file.getvalue()).decode()]})
    np.testing.assert_array_equal(served.predict(frame), by_bytes)


def test_a_model_loads_where_the_package_is_not_installed(
    life: Tracker, database: str, tmp_path: Path
) -> None:
    best = client(database).get_model_version_by_alias("seer-tests", "best")
    location = client(database).get_model_version_download_uri("seer-tests", str(best.version))
    # What pyfunc does with `code` and `loader_module`, without mlflow's own seconds of import.
    code = (
        "import sys; model = sys.argv[1]; sys.path.insert(0, model + '/code')\n"
        "from seer_scale import serving; print(serving.__file__)\n"
        "images = [[[[0.0] * 32] * 32] * 3]\n"
        "print(serving._load_pyfunc(model + '/data/trunk').predict(images).shape)"
    )
    model = location.removeprefix("file://")
    command = [sys.executable, "-I", "-c", code, model]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    width = build_trunk("regnety_debug", device="meta").width
    assert done.stdout.splitlines() == [f"{model}/code/seer_scale/serving.py", str((1, width))]


@pytest.mark.parametrize(
    ("source", "uri", "sentence"),
    [
        ("models:/seer-tests@none", None, "alias none not found"),
        ("models:/nobody/1", None, "nobody not found"),
        ("models:/seer-tests@latest", "http://127.0.0.1:9", "127.0.0.1:9 does not answer"),
        ("models:/seer-tests@latest", "sqlite:////nowhere/x.db", "x.db does not answer"),
    ],
)
def test_a_model_that_is_not_there_gets_a_sentence(
    life: Tracker, database: str, source: str, uri: str | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        load(source, tracking_uri=uri or database)


def test_a_resumed_run_goes_on_and_a_killed_sender_costs_and_doubles_nothing(
    life: Tracker, database: str
) -> None:
    run_id = life.run_id
    assert run_id is not None
    versions = len(client(database).search_model_versions(f"run_id = '{run_id}'"))
    tracker = start(life.run_dir, database, first_step=600)
    assert tracker.run_id == run_id
    tracker.log_params({"section.key_1": 1, "section.key_2": 7, "new": 1})
    tracker.log_model(life.run_dir / "checkpoints" / "step_00000500" / "trunk", step=500)
    # Up to where it resumes everything is there; the steps after that are another attempt's.
    for step in range(500, 4000):
        tracker.log_metrics({"loss": 2 / (step + 1), "norm": step, "more": 0.5}, step)
    size = (tracker.folder / "spool.jsonl").stat().st_size
    sent = tracker.folder / "sent.json"
    until(lambda: json.loads(sent.read_text())["offset"] > size // 2)
    pid = holder(tracker.folder)
    assert pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: holder(tracker.folder) is None)
    state = json.loads(sent.read_text())
    assert state["offset"] < size
    # Worse than a death between a request and writing it down: nothing of it is known any more.
    sent.write_text(json.dumps({"uri": state["uri"], "run_id": None, "offset": 0, "steps": {}}))

    outcome = sender.sync(tracker.run_dir)
    assert (outcome.left, outcome.rejected, outcome.run_id) == (0, 2, run_id)
    losses = history(database, run_id, "loss")
    attempts = sorted([*range(801), 802, *range(601, 4000)])
    assert [step for step, _ in losses] == attempts
    assert {(step, 2 / (step + 1)) for step in range(601, 4000)} <= set(losses)
    newest: dict[int, Any] = {}
    for point in client(database).get_metric_history(run_id, "loss"):
        newest[point.step] = max(newest.get(point.step, point), point, key=lambda p: p.timestamp)
    expected = [(1 if step <= 600 else 2) / (step + 1) for step in range(4000)]
    assert [newest[step].value for step in range(4000)] == expected
    assert history(database, run_id, "norm") == [(step, step) for step in range(500, 4000)]
    assert len(client(database).search_model_versions(f"run_id = '{run_id}'")) == versions >= 2
    run = client(database).get_run(run_id)
    same = f"tags.`seer_scale.spool` = '{run.data.tags['seer_scale.spool']}'"
    assert len(client(database).search_runs([run.info.experiment_id], same)) == 1
    assert (run.data.params["section.key_2"], run.data.params["new"]) == ("2", "1")
    assert run.data.tags["resumed.section.key_2"] == "7"
    assert "resumed.section.key_1" not in run.data.tags
    assert run.info.status == "KILLED"
    # Resumed from the newest step, nothing is said twice.
    tracker.start("life", step=3999)
    for step in range(3900, 4002):
        tracker.log_metrics({"loss": 2 / (step + 1)}, step)
    # It was the sender that was killed, not the run; its end arrives as it was.
    assert tracker.close() is False
    assert sender.sync(tracker.run_dir).left == 0
    assert client(database).get_run(run_id).info.status == "FINISHED"
    losses = history(database, run_id, "loss")
    assert [step for step, _ in losses] == [*attempts, 4000, 4001]


def unsent(run_dir: Path, uri: str) -> Tracker:
    """A run that nobody sends yet."""
    tracker = Tracker(run_dir)
    names = {"experiment": "tests", "registered_name": "unsent", "run_name": run_dir.name}
    settings = {"id": run_dir.name, "uri": uri, "system_metrics": False, **names}
    write_json(tracker.folder / SETTINGS, settings)
    tracker.start(run_dir.name)
    return tracker


def test_a_model_arrives_although_its_checkpoint_is_deleted_before_it_is_sent(
    database: str, folder: Path
) -> None:
    tracker, trunk = unsent(folder / "pruned", database), build_trunk("regnety_debug")
    checkpoint = tracker.run_dir / "checkpoints" / "step_00000005"
    export_trunk(trunk, checkpoint / "trunk", trunk="regnety_debug", step=5)
    tracker.log_model(checkpoint / "trunk", step=5, aliases=["best"])
    shutil.rmtree(checkpoint)
    tracker.close()
    outcome = sender.sync(tracker.run_dir)
    assert (outcome.left, outcome.rejected) == (0, 0)
    arrived = load("models:/unsent@best", tracking_uri=database).state_dict()
    expected = trunk.state_dict()
    assert arrived.keys() == expected.keys()
    assert all(torch.equal(arrived[name], value) for name, value in expected.items())
    assert not list((tracker.folder / "models").glob("*"))  # nothing waits any more


def test_sync_ends_with_1_while_events_of_any_run_are_left(
    database: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(sender, "SYNC_ATTEMPTS", 1)
    away = unsent(folder / "away", f"http://127.0.0.1:{free_port()}")
    there = unsent(folder / "there", database)
    for tracker in (away, there):
        tracker.close()
    assert sync.main([str(away.run_dir), str(there.run_dir)]) == 1
    said = capsys.readouterr()
    assert f"{away.run_dir}: 0 events sent, 2 left, run not created\n" in said.out
    assert f"{there.run_dir}: 2 events sent, 0 left, run " in said.out
    assert said.err.startswith(f"error: {away.run_dir} is not all sent: ")
    assert sync.main([str(there.run_dir)]) == 0


def test_what_is_refused_for_good_is_counted_and_never_called_nothing_left(
    database: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name of before, when names were not checked at the start: the registry refuses it."""
    tracker = unsent(folder / "refused", database)
    settings = json.loads((tracker.folder / SETTINGS).read_text())
    write_json(tracker.folder / SETTINGS, {**settings, "registered_name": "team/seer"})
    exported = tracker.run_dir / "trunk"
    export_trunk(build_trunk("regnety_debug"), exported, trunk="regnety_debug", step=5)
    tracker.log_model(exported, step=5)
    tracker.log_metrics({"loss": 0.5}, 5)
    assert tracker.refused() is None
    tracker.close()
    for again in range(2):
        assert sync.main([str(tracker.run_dir)]) == 1
        said = capsys.readouterr()
        run_id = tracker.run_id
        sent = 0 if again else 3
        line = f"{tracker.run_dir}: {sent} events sent, 1 refused, run {run_id}\n"
        assert said.out == line
        assert said.err == f"error: {tracker.run_dir}: {tracker.refused()}\n"
    assert tracker.refused() is not None
    assert "refused 1 record of this run for good (the last: " in str(tracker.refused())
    assert "Names cannot contain" in str(tracker.refused())
    assert str(tracker.folder / "rejected.jsonl") in str(tracker.refused())
    # Another server has refused nothing.
    assert run_id is not None
    elsewhere = f"sqlite:///{folder}/elsewhere.db"
    write_json(tracker.folder / SETTINGS, settings)
    assert sync.main([str(tracker.run_dir), "--uri", elsewhere]) == 0
    assert "4 events sent, 0 left" in capsys.readouterr().out


def test_a_count_of_refusals_that_an_older_sender_did_not_write(tmp_path: Path) -> None:
    from seer_scale.tracking.refusals import count_refusals, refusals

    (tmp_path / "rejected.jsonl").write_text('{"offset": 1, "reason": "r", "event": {}}\n' * 3)
    assert count_refusals({"offset": 9}, tmp_path) == 3
    assert count_refusals({"offset": 9, "rejected": 1}, tmp_path) == 1
    assert count_refusals({"offset": 0}, tmp_path) == 0
    assert refusals({"offset": 0}, tmp_path) is None
    (tmp_path / "rejected.jsonl").unlink()
    assert "(the last: not known)" in str(refusals({"offset": 9, "rejected": 1}, tmp_path))


def test_the_names_that_a_registry_refuses_are_those_refused_at_the_start(database: str) -> None:
    from mlflow.exceptions import MlflowException

    from seer_scale.config.mlflow_names import name_problem, plain_name

    names = ["team/seer", "a:b", ".", "..", " ", "/", "a//b", "/a", "a/", "https://x", "a/../b"]
    names += [
        "seer",
        "seer demo",
        "a.b.c",
        "é",
        "a@b",
        "a#b?c%20",
        "...",
        "..a",
        ".a",
        "a.",
        " a ",
        "-",
    ]
    for name in names:
        try:
            client(database).create_registered_model(name)
        except MlflowException:
            assert name_problem(name), name
        else:
            assert name_problem(name) is None, name
        assert name_problem(plain_name(name)) is None, name


def test_a_deleted_experiment_is_said_and_what_it_missed_arrives_once_it_is_restored(
    database: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run that finds its experiment deleted, and one whose experiment is deleted meanwhile."""
    from seer_scale.doctor.tracking import check_experiment

    monkeypatch.setattr(sender, "SYNC_ATTEMPTS", 1)
    registry = client(database)
    number = registry.create_experiment("deleted")
    meanwhile, late = (unsent(folder / name, database) for name in ("meanwhile", "late"))
    for tracker in (meanwhile, late):
        settings = json.loads((tracker.folder / SETTINGS).read_text())
        write_json(tracker.folder / SETTINGS, {**settings, "experiment": "deleted"})
    assert sender.sync(meanwhile.run_dir).left == 0
    assert [one.status for one in check_experiment(database, "deleted")] == ["ok"]
    registry.delete_experiment(number)
    (found,) = check_experiment(database, "deleted")
    assert found.status == "warn"
    restore = f"mlflow experiments restore --experiment-id {number}"
    assert restore in found.advice
    for tracker in (meanwhile, late):
        tracker.log_metrics({"loss": 0.5}, 1)
        tracker.close()
        assert sync.main([str(tracker.run_dir)]) == 1
        said = capsys.readouterr()
        assert "0 left" not in said.out
        assert restore in said.err
        assert restore in str(tracker.problem())
    registry.restore_experiment(number)
    for tracker in (meanwhile, late):
        outcome = sender.sync(tracker.run_dir)
        assert (outcome.left, outcome.rejected) == (0, 0)
        assert outcome.run_id is not None
        assert history(database, outcome.run_id, "loss") == [(1, 0.5)]
        assert tracker.problem() is None


def test_a_training_process_killed_in_mid_run_leaves_a_run_that_says_so(
    database: str, folder: Path
) -> None:
    run_dir = folder / "killed-training"
    code = (
        "import os, sys; from seer_scale.tracking import start_tracking\n"
        "tracker = start_tracking(sys.argv[1], uri=sys.argv[2], experiment='tests',\n"
        "    registered_name='seer-tests', run_name='killed', system_metrics=False)\n"
        "[tracker.log_metrics({'loss': 0.5}, step) for step in range(50)]\n"
        "os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(run_dir), database]
    assert subprocess.run(command, env=environment, check=False).returncode == -signal.SIGKILL
    until(lambda: holder(run_dir / "tracking") is None)
    run_id = json.loads((run_dir / "tracking" / "sent.json").read_text())["run_id"]
    assert history(database, run_id, "loss") == [(step, 0.5) for step in range(50)]
    assert client(database).get_run(run_id).info.status == "KILLED"


def test_a_server_that_accepts_and_never_answers_slows_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        tracker = start(tmp_path / "run", uri, drain_s=0.0)
        assert durations(tracker, range(500)) < 5e-3
        pid = holder(tracker.folder)
        assert pid
        for signal_of_a_launcher in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, signal_of_a_launcher)
        log = tracker.folder / "sender.log"
        until(lambda: "not sent, next attempt" in log.read_text())
        assert durations(tracker, range(500, 1000)) < 5e-3
        began = time.monotonic()
        assert tracker.close(wait_s=0.5) is False
        assert time.monotonic() - began < 2
        until(lambda: holder(tracker.folder) is None)
    assert tracker.run_id is None
    monkeypatch.setattr(sender, "SYNC_ATTEMPTS", 1)
    outcome = sender.sync(tracker.run_dir)  # the socket is gone: connections are refused now
    assert (outcome.sent, outcome.left) == (0, 1004)
    assert outcome.reason


def test_a_server_of_500s_slows_nothing_and_gets_everything_once_it_is_mended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_error(500, "internal error")

        do_GET = do_POST = do_PATCH = answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    broken = ThreadingHTTPServer(("127.0.0.1", 0), Broken)
    port = broken.server_address[1]
    thread = threading.Thread(target=broken.serve_forever, args=(0.05,))
    thread.start()
    tracker = start(tmp_path / "run", f"http://127.0.0.1:{port}", drain_s=0.0)
    until(lambda: "not sent, next attempt" in (tracker.folder / "sender.log").read_text())
    assert durations(tracker, range(300)) < 5e-3
    assert tracker.close(wait_s=1) is False
    until(lambda: holder(tracker.folder) is None)
    assert not (tracker.folder / "rejected.jsonl").exists()  # nothing was given up
    broken.shutdown()
    broken.server_close()
    thread.join()
    mended = Server(tmp_path, port)
    try:
        until(mended.healthy)
        outcome = sender.sync(tracker.run_dir)
        assert outcome.left == 0
        assert outcome.run_id is not None
        values = history(mended.uri(), outcome.run_id, "loss")
        assert values == [(step, 1 / (step + 1)) for step in range(300)]
    finally:
        mended.kill()


def durations(tracker: Tracker, steps: range) -> float:
    """Seconds that 95 of 100 calls stay under; on a shared machine any process may be preempted."""
    times = []
    for step in steps:
        began = time.perf_counter()
        tracker.log_metrics({"loss": 1 / (step + 1), "lr": 0.1}, step)
        times.append(time.perf_counter() - began)
    return sorted(times)[int(0.95 * len(times))]


def test_a_server_killed_in_mid_run_gets_everything_later(
    server: Server,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    until(server.healthy)
    run_dir = folder / "killed-server"
    tracker = start(run_dir, server.uri(f"someone:{SECRET}@"), drain_s=0.0)
    tracker.log_params({"lr": 0.1, "trunk": "regnety_debug"})
    exported = run_dir / "checkpoints" / "step_00000009" / "trunk"
    export_trunk(build_trunk("regnety_debug"), exported, trunk="regnety_debug", step=9)
    tracker.log_model(exported, step=9, aliases=["best"])
    durations(tracker, range(100))
    until(tracker.all_sent)
    run_id = tracker.run_id
    assert pickles(folder / "server-artifacts") == []

    server.kill()
    assert durations(tracker, range(100, 400)) < 5e-3
    assert tracker.close(wait_s=1) is False
    until(lambda: holder(tracker.folder) is None)
    server.start()
    until(server.healthy)
    assert sync.main([str(run_dir)]) == 0
    assert capsys.readouterr().out == f"{run_dir}: 301 events sent, 0 left, run {run_id}\n"
    assert run_id is not None
    expected = [(step, 1 / (step + 1)) for step in range(400)]
    assert history(server.uri(), run_id, "loss") == expected
    assert client(server.uri()).get_run(run_id).info.status == "FINISHED"
    assert len(client(server.uri()).search_model_versions(f"run_id = '{run_id}'")) == 1
    with torch.inference_mode():
        images = torch.randn(1, 3, 32, 32)
        downloaded = load("models:/seer-tests@best", tracking_uri=server.uri())
        assert torch.equal(downloaded(images), load(run_dir)(images))
    with_secret = [
        path
        for path in folder.rglob("*")
        if path.is_file() and SECRET.encode() in path.read_bytes()
    ]
    assert with_secret == []


def test_a_dead_server_delays_nothing_and_sync_takes_over_once_it_is_back(folder: Path) -> None:
    run_dir, port = folder / "dead-server", free_port()
    uri = f"http://127.0.0.1:{port}"
    began = time.monotonic()
    tracker = start(run_dir, uri, drain_s=600.0)
    assert tracker.wait_for_run_id(120) is None
    failed = json.loads((tracker.folder / "failing.json").read_text())
    assert failed["reason"]
    # The sender's import of mlflow is in it, which takes long on a busy machine.
    assert time.monotonic() - began < 60
    tracker.log_metrics({"loss": 0.5}, 1)
    follower = holder(tracker.folder)
    assert follower
    began = time.monotonic()
    with pytest.raises(UserError, match=f"being sent by process {follower}; wait for it to end"):
        sender.sync(run_dir)
    assert tracker.close(wait_s=60) is False
    assert time.monotonic() - began < 5
    assert holder(tracker.folder) == follower

    (folder / "back").mkdir()
    back = Server(folder / "back", port)
    try:
        # Stopped until it has been asked to end, the follower cannot be the one that sends.
        os.kill(follower, signal.SIGSTOP)
        until(back.healthy)
        awake = threading.Timer(1.0, os.kill, (follower, signal.SIGCONT))
        awake.start()
        outcome = sender.sync(run_dir)
        assert (outcome.sent, outcome.left) == (5, 0)
        assert outcome.run_id is not None
        assert history(uri, outcome.run_id, "loss") == [(1, 0.5)]
        assert client(uri).get_run(outcome.run_id).info.status == "FINISHED"
    finally:
        back.kill()
    assert not (tracker.folder / "failing.json").exists()
    assert holder(tracker.folder) is None


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["nowhere"], 1, "nowhere is not the folder of a tracked run"),
        ([], 2, "RUN_DIR"),
        (["--help"], 0, "Exits with 0 when MLflow has everything"),
    ],
)
def test_sync_says_what_is_wrong(arguments: list[str], status: int, sentence: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "sync.py"), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    assert sentence in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
