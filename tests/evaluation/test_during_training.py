"""Evaluation during pretraining: same number anywhere, training unaffected, alias `best`."""

from __future__ import annotations

from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import seer_scale
from harness.jobs import RECIPES, ROOT, arguments, lines, losses, run_job, write_images
from harness.pool import Distributed
from seer_scale.checkpoint import CheckpointReader, list_checkpoints
from seer_scale.config.recipe import parse
from seer_scale.data import open_source
from seer_scale.errors import ConfigError
from seer_scale.evaluation.features import extract_features
from seer_scale.evaluation.prototype_sheet import score_prototypes
from seer_scale.evaluation.tasks.knn import knn_top1
from seer_scale.models import build_model
from seer_scale.tracking.spool import read_events
from tests.evaluation.patterns import write_patterns

KEY = "eval/knn_top1"


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_patterns(tmp_path_factory.mktemp("patterns"), train=24, val=11)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def judged(labelled: Path, *more: str) -> list[str]:
    return ["eval.every=3", f"eval.data={labelled}", "eval.size=48", "eval.k=5", *more]


def evaluations(run_dir: Path) -> dict[int, float]:
    return {line["step"]: line[KEY] for line in lines(run_dir) if KEY in line}


def training_losses(run_dir: Path) -> list[float]:
    return [line["loss"] for line in lines(run_dir) if "loss" in line]


def test_the_number_is_that_of_the_checkpoint_s_trunk(
    distributed: Distributed, images: Path, labelled: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    argv = arguments(images, run_dir, "checkpoint.keep=9", *judged(labelled))
    distributed(run_job, 1, argv)
    found = evaluations(run_dir)
    assert list(found) == [3, 6, 8]  # and the last step
    saved = list_checkpoints(run_dir / "checkpoints")
    assert [int(path.name[-8:]) for path in saved] == [3, 4, 6, 8]
    for path in saved:
        if (step := int(path.name[-8:])) in found:
            trunk = seer_scale.load(path)
            bank, queries = (
                extract_features(trunk, open_source(labelled / part), size=48)
                for part in ("train", "val")
            )
            assert found[step] == knn_top1(*bank, *queries, k=5)
            sheet = Image.open(run_dir / "eval" / f"prototypes_{path.name}.png")
            assert sheet.width > 600
            assert len(np.unique(np.array(sheet).reshape(-1, 3), axis=0)) > 1000


@pytest.mark.long
@pytest.mark.parametrize(
    ("world", "more"),
    [
        (2, ["sharding.strategy=fsdp"]),
        pytest.param(
            2,
            ["--deepspeed_config", str(ROOT / "ds_configs" / "zero3.json")],
            marks=pytest.mark.slow,
        ),
        (4, ["sharding.sync_bn_group_size=2"]),
    ],
)
def test_it_leaves_no_trace_and_does_not_depend_on_the_strategy(
    distributed: Distributed,
    images: Path,
    labelled: Path,
    tmp_path: Path,
    world: int,
    more: list[str],
) -> None:
    shared = [f"train.micro_batch_size={4 // world}", "train.steps=4", *more]
    plain, evaluated = tmp_path / "plain", tmp_path / "evaluated"
    distributed(run_job, world, arguments(images, plain, *shared))
    distributed(run_job, world, arguments(images, evaluated, *shared, *judged(labelled)))
    assert training_losses(evaluated) == losses(plain)
    trunk = seer_scale.load(evaluated)
    bank, queries = (
        extract_features(trunk, open_source(labelled / part), size=48) for part in ("train", "val")
    )
    assert evaluations(evaluated)[4] == knn_top1(*bank, *queries, k=5)


@pytest.mark.long
def test_resuming_is_sample_exact_and_keeps_what_was_found(
    distributed: Distributed, images: Path, labelled: Path, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    distributed(run_job, 1, arguments(images, whole, *judged(labelled)))
    distributed(run_job, 1, arguments(images, cut, "train.steps=8", *judged(labelled)))
    step_6 = cut / "checkpoints" / "step_00000006"
    argv = arguments(images, cut, "--resume", str(step_6), *judged(labelled))
    distributed(run_job, 1, argv)
    assert training_losses(cut) == training_losses(whole)
    assert evaluations(cut) == evaluations(whole)


def aliases(run_dir: Path) -> dict[int, list[str]]:
    """Returns the aliases of every model that the run has logged, by step."""
    events = read_events(run_dir / "tracking" / "spool.jsonl", 0)
    return {e.fields["step"]: e.fields["aliases"] for e in events if e.kind == "model"}


def run_judged(argv: list[str], scores: list[float]) -> int:
    """A run whose evaluations find given numbers."""
    from seer_scale.evaluation.during_training import DuringTraining

    judge, left = DuringTraining.judge, iter(scores)
    DuringTraining.judge = lambda self, checkpoint: {KEY: next(left)}  # type: ignore[method-assign]
    try:
        return run_job(argv)
    finally:
        DuringTraining.judge = judge  # type: ignore[method-assign]


def said_by_job(argv: list[str]) -> str:
    """A run's standard error."""
    with redirect_stderr(StringIO()) as said:
        run_job(argv)
    return said.getvalue()


@pytest.mark.long
def test_best_follows_the_evaluation(
    distributed: Distributed, images: Path, labelled: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    tracking = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    argv = arguments(images, run_dir, tracking, "tracking.registered_name=x", *judged(labelled))
    distributed(run_judged, 1, argv, [0.25, 0.75, 0.5])
    found = aliases(run_dir)
    assert found == {3: ["best"], 4: [], 6: ["best"], 8: []}
    # Resumed, what was best before still counts.
    step_6 = run_dir / "checkpoints" / "step_00000006"
    distributed(run_judged, 1, [*argv, "--resume", str(step_6)], [0.7])
    assert aliases(run_dir)[8] == []


def test_what_is_wrong_with_it_is_said_before_training(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"eval\.every is 5, but eval\.data is not given"):
        parse(arguments(images, tmp_path, "eval.every=5"), recipes=RECIPES, ranks=1)
    argv = arguments(images, tmp_path / "run", *judged(tmp_path / "nowhere"))
    with pytest.raises(AssertionError, match=r"nowhere is not a folder with `train` and `val`"):
        distributed(run_job, 1, argv)
    assert not (tmp_path / "run").exists()


def test_prototype_scores_are_the_model_s(
    distributed: Distributed, images: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    more = ["model.head_batch_norm=true", "train.steps=3"]
    distributed(run_job, 1, arguments(images, run_dir, *more))
    reader = CheckpointReader(list_checkpoints(run_dir / "checkpoints")[-1])
    config = reader.manifest["config"]["model"]
    model = build_model(
        config["trunk"],
        head_dims=config["head_dims"],
        head_batch_norm=True,
        prototypes=config["prototypes"],
        device="cpu",
    )
    model.load_state_dict({name: reader.whole(name) for name in reader.names})
    model.eval()
    pictures = torch.randn(5, 3, 48, 48)
    with torch.inference_mode():
        _, expected = model([pictures])
        actual = score_prototypes(reader, model.trunk(pictures))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.long)])
def test_images_that_cannot_be_used_are_named_and_the_run_goes_on(
    distributed: Distributed, images: Path, tmp_path: Path, world: int
) -> None:
    """The number is that of the set without them; without any image there is none."""
    spoilt, clean = (
        write_patterns(tmp_path / name, train=24, val=11) for name in ("spoilt", "clean")
    )
    for part, number in (("train", 5), ("val", 3), ("val", 7)):
        names = sorted(path.relative_to(clean) for path in (clean / part).rglob("*.*"))
        (spoilt / names[number]).write_bytes(b"<html>sorry</html>")
        (clean / names[number]).unlink()
    found, said = {}, ""
    for data in (spoilt, clean):
        run_dir = tmp_path / f"run-{data.name}"
        argv = arguments(images, run_dir, *judged(data), "train.steps=4")
        said += distributed(said_by_job, world, [*argv, f"train.micro_batch_size={4 // world}"])[0]
        found[data] = evaluations(run_dir)
        counts = [line.get("eval/bad_images") for line in lines(run_dir) if KEY in line]
        assert counts == [3.0 if data == spoilt else None] * 2
    assert found[spoilt] == found[clean]
    assert said.count("eval.data: warning: 3 of 35 images cannot be used and are left out") == 1
    for path in (spoilt / "val").rglob("*.*"):
        path.write_bytes(b"")
    argv = arguments(images, tmp_path / "blind", *judged(spoilt), "train.steps=3")
    distributed(run_job, 1, argv)
    (line,) = [line for line in lines(tmp_path / "blind") if "eval/bad_images" in line]
    assert (line["eval/bad_images"], KEY in line) == (12.0, False)
    assert lines(tmp_path / "blind")[-1]["step"] == 3
