"""How often the files of a checkpoint are opened, and how many are open at once."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch

from harness.engines import configuration
from harness.reads import opened, write_sparse
from seer_scale.checkpoint import CheckpointReader, reader
from seer_scale.checkpoint.manifest import read_manifest
from seer_scale.checkpoint.staging import Staging
from seer_scale.checkpoint.trunk_export import add_trunk
from seer_scale.train import build

RANKS = 64


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step_00000007"
    model = build.model_of(configuration("model.trunk=regnety_debug"), torch.device("meta"))
    write_sparse(folder, model, "fsdp", RANKS)
    return folder


def test_the_trunk_takes_two_opens_a_file(saved: Path) -> None:
    manifest = {**read_manifest(saved), "trunk": "regnety_debug"}
    files = manifest.pop("files")
    with opened(saved) as opens:
        add_trunk(saved, manifest, files, Staging(), lambda: 1000.0)
    ranks = [count for name, count in opens.items() if name.startswith("rank_")]
    assert len(ranks) > RANKS // 2
    assert set(ranks) <= {1, 2}  # header and numbers


@pytest.mark.parametrize(("most", "expected"), [(3, 3), (512, RANKS)])
def test_no_more_files_are_open_than_allowed(
    saved: Path, monkeypatch: pytest.MonkeyPatch, most: int, expected: int
) -> None:
    monkeypatch.setattr(reader, "most_open", lambda: most)
    before = len(os.listdir("/proc/self/fd"))
    opened_once = CheckpointReader(saved)
    for name in opened_once.names:
        assert not opened_once.whole(name).any()
    open_now = len(os.listdir("/proc/self/fd")) - before
    assert expected // 2 < open_now <= expected
    opened_once.close()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("limit", "expected"), [(1024, 512), (20, 16)])
def test_half_of_the_files_of_a_process_may_be_open(
    monkeypatch: pytest.MonkeyPatch, limit: int, expected: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
    assert reader.most_open() == expected
