"""Names and options of objectives: what is found, and the sentence for what is not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from seer_scale.errors import ConfigError
from seer_scale.objectives import OBJECTIVES, SimCLR, SwAV, build_objective, check_options

PLUG_IN = """
from torch import Tensor


class Spread:
    def __init__(self, *, crops: int = 6, power: float, mode: str | None = None) -> None:
        if power <= 0:
            raise ValueError("must be more than nothing")
        self.crops = crops
        self.power = power

    def __call__(self, embeddings: Tensor, scores: Tensor):
        loss = embeddings.mean(dim=0).norm() ** self.power + 0 * scores.mean()
        return loss, {"rows": float(len(embeddings))}
"""


def install(folder: Path, package: str, source: str, entry: str) -> None:
    """What an installer leaves in site-packages: the package and its metadata."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text(source)
    metadata = folder / f"{package}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[seer_scale.objectives]\n{entry}\n")


def test_the_built_in_ones_take_their_options() -> None:
    swav = build_objective(
        "swav", crops=8, options={"epsilon": 0.03, "sinkhorn_iterations": 10, "assign_crops": [1]}
    )
    assert isinstance(swav, SwAV)
    assert (swav.crops, swav.epsilon, swav.sinkhorn_iterations) == (8, 0.03, 10)
    assert swav.assign_crops == (1,)
    simclr = build_objective("simclr", crops=2, options={"temperature": 1})
    assert isinstance(simclr, SimCLR)
    assert (simclr.crops, simclr.temperature) == (2, 1)
    for name in OBJECTIVES:
        check_options(name, {})


TAKES = "temperature, epsilon, sinkhorn_iterations, assign_crops, queue_length, queue_start_steps"


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        (
            "swav",
            {"epsilom": 0.03},
            "objective.epsilom is not an option of objective 'swav': did you mean epsilon? "
            f"It takes {TAKES}",
        ),
        (
            "swav",
            {"zzz": 0.03},
            f"objective.zzz is not an option of objective 'swav': it takes {TAKES}",
        ),
        (
            "swav",
            {"crops": 6},
            f"objective.crops is not an option of objective 'swav': it takes {TAKES}",
        ),
        (
            "swav",
            {"group": None},
            f"objective.group is not an option of objective 'swav': it takes {TAKES}",
        ),
        (
            "simclr",
            {"epsilon": 0.03},
            "objective.epsilon is not an option of objective 'simclr': it takes temperature",
        ),
        (
            "swav",
            {"epsilon": "small"},
            "objective.epsilon is 'small', but objective 'swav' takes epsilon: float = 0.05 "
            "(input should be a valid number)",
        ),
        (
            "swav",
            {"temperature": True},
            "objective.temperature is True, but objective 'swav' takes temperature: float = 0.1 "
            "(input should be a valid number)",
        ),
        (
            "swav",
            {"sinkhorn_iterations": 2.5},
            "objective.sinkhorn_iterations is 2.5, but objective 'swav' takes "
            "sinkhorn_iterations: int = 3 (input should be a valid integer)",
        ),
        (
            "swav",
            {"assign_crops": [0, "one"]},
            "objective.assign_crops is [0, 'one'], but objective 'swav' takes "
            "assign_crops: tuple[int, ...] = (0, 1) (input should be a valid integer)",
        ),
        (
            "swav",
            {"assign_crops": 0},
            "objective.assign_crops is 0, but objective 'swav' takes "
            "assign_crops: tuple[int, ...] = (0, 1) (input should be a valid array)",
        ),
        (
            "simclr",
            {"temperature": None},
            "objective.temperature is None, but objective 'simclr' takes temperature: float = 0.1 "
            "(input should be a valid number)",
        ),
        ("simclr", {"temperature": 0.0}, "objective.temperature is 0.0, but must be positive"),
        ("swav", {"epsilon": -1.0}, "objective.epsilon is -1.0, but must be positive as a float32"),
        (
            "swav",
            {"epsilon": math.nan},
            "objective.epsilon is nan, but must be positive as a float32",
        ),
        (
            "swav",
            {"epsilon": 0.03, "assign_crops": [0, 9]},
            "objective.assign_crops is [0, 9], but must hold different crops from 0 to 5",
        ),
        (
            "swaw",
            {},
            "objective.name is 'swaw', which is not an objective: did you mean swav? "
            "Known are simclr, swav",
        ),
        ("moco", {}, "objective.name is 'moco', which is not an objective: known are simclr, swav"),
    ],
    ids=str,
)
def test_a_mistake_has_one_sentence(name: Any, options: Any, sentence: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        check_options(name, options)
    assert str(caught.value) == sentence


def test_options_are_judged_with_the_crops_of_the_run() -> None:
    check_options("swav", {"assign_crops": [0, 7]}, crops=8)
    with pytest.raises(ConfigError, match=r"assign_crops is \[0, 3\], .* from 0 to 1"):
        check_options("swav", {"assign_crops": [0, 3]}, crops=2)
    with pytest.raises(ConfigError, match="'simclr' refuses 1 crops with its default options: "):
        check_options("simclr", {}, crops=1)


def test_an_installed_package_brings_an_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "spread_plug_in", PLUG_IN, "spread = spread_plug_in:Spread")
    monkeypatch.syspath_prepend(tmp_path)
    objective = build_objective("spread", crops=2, options={"power": 2})
    loss, metrics = objective(torch.ones(4, 3), torch.ones(4, 5))
    assert float(loss) == pytest.approx(3)
    assert metrics == {"rows": 4.0}
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({}, r"objective 'spread' needs objective.power \(power: float\)"),
        ({"power": "x"}, "objective.power is 'x', but objective 'spread' takes power: float"),
        ({"power": 1, "mode": 3}, r"takes mode: .*str.*None = None"),
        ({"powr": 1, "power": 1}, r"did you mean power\? It takes power, mode"),
        (
            {"power": -1},
            "objective 'spread' refuses 6 crops with objective.power=-1: must be more than nothing",
        ),
    ]
    for options, sentence in mistakes:
        with pytest.raises(ConfigError, match=sentence):
            check_options("spread", options)
    with pytest.raises(ConfigError, match=r"did you mean spread\? Known are simclr, spread, swav"):
        check_options("spred", {})


def test_a_package_that_cannot_be_imported_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "broken_plug_in", "import no_such_module", "broken = broken_plug_in:Broken")
    install(tmp_path, "hollow_plug_in", "", "hollow = hollow_plug_in:Hollow")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError,
        match="installed package broken_plug_in, which offers it as broken_plug_in:Broken, "
        "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'",
    ):
        check_options("broken", {})
    with pytest.raises(ConfigError, match="hollow_plug_in:Hollow, cannot be imported: Attribute"):
        check_options("hollow", {})


def test_two_packages_with_one_name_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("first_plug_in", "second_plug_in"):
        install(tmp_path, package, PLUG_IN, f"spread = {package}:Spread")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ConfigError, match="first_plug_in and second_plug_in both offer: uninstall one of them"
    ):
        check_options("spread", {"power": 1})


def test_a_package_cannot_replace_a_built_in_objective(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "usurping_plug_in", PLUG_IN, "swav = usurping_plug_in:Spread")
    monkeypatch.syspath_prepend(tmp_path)
    assert isinstance(build_objective("swav", crops=6, options={}), SwAV)
