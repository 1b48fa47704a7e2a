"""`make bench-memory`: measured state and activations equal formula and profile."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks import memory_report
from benchmarks.memory import Activations, State, fresh, measure_activations, measure_state
from harness.engines import STRATEGIES
from harness.pool import Distributed
from seer_scale.parallel.state_bytes import StateBytes

SMALL = ("model.head_dims=[32, 16]", "model.prototypes=40")


@pytest.mark.parametrize(
    "strategy",
    [s if s in ("fsdp", "zero2") else pytest.param(s, marks=pytest.mark.slow) for s in STRATEGIES],
)
def test_a_small_model_holds_what_the_formula_says(distributed: Distributed, strategy: str) -> None:
    for state in distributed(measure_state, 2, strategy, *SMALL, "model.trunk=regnety_debug"):
        measured, expected = asdict(state.measured), asdict(state.expected)
        for kind, size in expected.items():
            # Slices are padded: ZeRO's to a multiple of 4 elements, FSDP's to whole rows.
            assert measured[kind] == pytest.approx(size, rel=1e-3), kind


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_regnety_16gf_holds_what_the_formula_says_within_5_percent(strategy: str) -> None:
    for state in fresh(2, measure_state, strategy):
        assert state.expected.parameters > 150e6
        assert abs(state.difference) < 0.05
        for kind, size in asdict(state.expected).items():
            assert asdict(state.measured)[kind] == pytest.approx(size, rel=0.05), kind


@pytest.mark.slow
def test_activations_are_as_profiled_and_auto_is_within_its_budget(
    distributed: Distributed,
) -> None:
    # Small crops would leave the stem, which is never recomputed, with most of the bytes.
    none, auto, full = distributed(measure_activations, 1, 1, *SMALL, "model.trunk=regnety_200mf")[
        0
    ]
    for mode in (none, auto, full):
        assert 0.98 * mode.profiled <= mode.peak <= mode.profiled + 100
        assert mode.seconds > 0
    assert none.recomputed == 0 < auto.recomputed < full.recomputed == 13
    assert full.peak <= auto.peak <= float(auto.mode.partition(":")[2]) * 2**30 < none.peak


def test_tables_and_plot_show_the_rank_that_holds_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, plot = tmp_path / "sharding.md", tmp_path / "memory.png"
    document.write_text(
        "".join(f"<!-- {name} -->\n<!-- /{name} -->\n" for name in ("memory", "activations"))
    )
    monkeypatch.setattr(memory_report, "DOCUMENT", document)
    monkeypatch.setattr(memory_report, "PLOT", plot)
    mib = 2**20
    expected = StateBytes(100 * mib, 100 * mib, 200 * mib)
    states = [
        State(StateBytes(extra + 100 * mib, 100 * mib, 200 * mib), expected, 3 * mib)
        for extra in (0, 4 * mib)
    ]
    rows = [{"strategy": "ddp", "ranks": 2, "rank": r, **asdict(s)} for r, s in enumerate(states)]
    modes = [Activations("none", 0, 2**30, 2**30, 2.0), Activations("full", 9, 2**29, 2**29, 2.5)]
    memory_report.write({"state": rows, "activations": [asdict(mode) for mode in modes]})
    text = document.read_text()
    assert "| ddp | 2 | 104.0 | 100.0 | 200.0 | 404.0 | 400.0 | +1.00 % | 3.0 |" in text
    assert "| `full` | 9 | 0.500 | 0.500 | 0.50 | 1.25 |" in text
    assert imread(plot).std() > 0.05
