"""Random damage to a checkpoint: found, in a sentence, or without any effect; 500 cases, seeded."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seer_scale.checkpoint import CheckpointReader, first_whole
from seer_scale.errors import CheckpointError
from tests.checkpoint.test_checkpoint import trained, write

CASES = 500


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    local = {"rng.cpu": torch.get_rng_state(), "objective.queue": torch.arange(6.0).view(1, 3, 2)}
    return write(tmp_path_factory.mktemp("good"), 7, model=trained(), local=local)


def everything(reader: CheckpointReader) -> dict[str, Tensor]:
    """All that a resumed run takes from a checkpoint."""
    found = {name: reader.whole(name) for name in reader.names}
    parameters = [name for name in reader.names if reader.has_momentum(name)]
    found |= {f"momentum/{name}": reader.whole(name, "momentum") for name in parameters}
    return found | {f"local/{key}": value for key, value in reader.local_state(0).items()}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(rng: random.Random, folder: Path) -> None:
    path = rng.choice(files(folder))
    data = bytearray(path.read_bytes())
    # The first bytes are a header: damage there is of another kind than among the numbers.
    reach = rng.choice([16, 4000, len(data)])
    for _ in range(rng.choice([1, 1, 3, 50])):
        data[rng.randrange(min(reach, len(data)))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(data))


def truncate(rng: random.Random, folder: Path) -> None:
    path = rng.choice(files(folder))
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def extend(rng: random.Random, folder: Path) -> None:
    with rng.choice(files(folder)).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))


def zero(rng: random.Random, folder: Path) -> None:
    """As a disk leaves a page that was never written."""
    path = rng.choice(files(folder))
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data))
    stop = min(len(data), start + 4096)
    data[start:stop] = bytes(stop - start)
    path.write_bytes(bytes(data))


def remove(rng: random.Random, folder: Path) -> None:
    rng.choice(files(folder)).unlink()


def rename(rng: random.Random, folder: Path) -> None:
    path = rng.choice(files(folder))
    path.rename(path.with_name(rng.choice(["other", "rank_00001.safetensors", "manifest.old"])))


def swap(rng: random.Random, folder: Path) -> None:
    one, two = rng.sample(files(folder), 2)
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def add(rng: random.Random, folder: Path) -> None:
    (folder / rng.choice(["notes.txt", "rank_00007.safetensors"])).write_bytes(rng.randbytes(50))


def edit(rng: random.Random, folder: Path) -> None:
    """Another value, a lost key or a new one, somewhere in the manifest."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    place = content
    while True:
        key = rng.choice(sorted(place))
        if not isinstance(place[key], dict) or not place[key] or rng.random() < 0.2:
            break
        place = place[key]
    values = [None, -1, 0, 2**70, 1e308, "", "x" * 1000, [], {}, [[[]]], True, place[key]]
    action = rng.randrange(3)
    if action == 0:
        del place[key]
    elif action == 1:
        place[key] = rng.choice(values)
    else:
        place[f"{key}_"] = rng.choice(values)
    path.write_text(json.dumps(content, indent=rng.choice([None, 1, 4])))


def replace(rng: random.Random, folder: Path) -> None:
    """A file by a folder, a link to nowhere or brackets without end."""
    path = rng.choice(files(folder))
    path.unlink()
    kind = rng.randrange(3)
    if kind == 0:
        path.mkdir()
    elif kind == 1:
        path.symlink_to("nowhere")
    else:
        path.write_bytes(b"[" * 200_000)


DAMAGES: list[Callable[[random.Random, Path], None]] = [
    *(flip, flip, flip, truncate, truncate, extend, zero, remove, rename, swap),
    *(add, edit, edit, edit, replace),
]


def test_no_damage_loads_wrong_weights(good: Path, tmp_path: Path) -> None:
    expected, state = everything(CheckpointReader(good)), CheckpointReader(good).manifest
    found = harmless = 0
    for case in range(CASES):
        rng = random.Random(case)
        folder = tmp_path / str(case) / good.name
        shutil.copytree(good, folder)
        damage = rng.choice(DAMAGES)
        damage(rng, folder)
        where = f"case {case}, {damage.__name__}"
        try:
            reader = first_whole([folder], print)
            assert reader is not None, where
            actual = everything(reader)
        except CheckpointError as error:
            found += 1
            sentence = str(error)
            assert "\n" not in sentence, where
            assert str(folder) in sentence, where
            assert len(sentence) < 1000, where
        else:  # anything else fails the test: an exception of another kind, a crash
            harmless += 1
            assert reader.manifest == state, where
            assert actual.keys() == expected.keys(), where
            assert all(torch.equal(actual[key], value) for key, value in expected.items()), where
        shutil.rmtree(folder.parent)
    assert found + harmless == CASES
    # What may be harmless: a file beside the others, and a manifest written in other words.
    assert harmless < CASES // 5
    assert found > CASES // 2


def test_the_newest_whole_one_is_taken(tmp_path: Path) -> None:
    folders = [write(tmp_path, step, model=trained(seed=step), keep=9) for step in (1, 2, 3, 4)]
    said: list[str] = []
    (folders[3] / "manifest.json").unlink()
    flipped = folders[2] / "rank_00000.safetensors"
    data = bytearray(flipped.read_bytes())
    data[-5] ^= 1
    flipped.write_bytes(bytes(data))
    reader = first_whole(folders[::-1], said.append)
    assert reader is not None
    assert reader.folder == folders[1]
    assert "step_00000004" in said[0]
    assert "step_00000003" in said[1]
    assert len(said) == 2
    assert "does not have the checksum" in said[1]
    for folder in folders[:2]:
        (folder / "trunk" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of 4 checkpoints is whole"):
        first_whole(folders[::-1], said.append)
    with pytest.raises(CheckpointError, match="json is 2 bytes long"):
        first_whole(folders[:1], said.append)
    assert first_whole([], said.append) is None


def test_a_newer_format_is_not_passed_over(tmp_path: Path) -> None:
    folders = [write(tmp_path, step, keep=9) for step in (1, 2)]
    path = folders[1] / "manifest.json"
    path.write_text(path.read_text().replace('"format": 3', '"format": 4'))
    with pytest.raises(CheckpointError, match="format 4 and this version reads up to 3"):
        first_whole(folders[::-1], print)
