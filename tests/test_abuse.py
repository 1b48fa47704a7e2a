"""Files of somebody who means harm: nothing runs, nothing is written elsewhere, nothing listens."""

from __future__ import annotations

import ast
import io
import json
import pickle
import re
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.jobs import ROOT
from seer_scale.checkpoint import CheckpointReader
from seer_scale.convert.loading import load
from seer_scale.data import open_source
from seer_scale.data.cache import Cache
from seer_scale.data.shard_index import Identity, index_path, load_index
from seer_scale.data.shard_manifest import read_shards
from seer_scale.errors import CheckpointError, DataError, UserError
from tests.data.broken_files import encode
from tests.test_fuzz import sealed, write_checkpoint


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """The file that nobody may make."""
    path = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Bomb(path)))  # the bomb is one
    assert path.exists()
    path.unlink()
    return path


def photo(seed: int = 0) -> bytes:
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), np.uint8)
    return encode(Image.fromarray(pixels), "JPEG")


def suspicious(text: str) -> list[str]:
    """Calls that run what a file says."""
    found = []
    module = r"(pickle|cloudpickle|dill|joblib|shelve|marshal)"
    for node in ast.walk(ast.parse(text)):
        call = ast.unparse(node) if isinstance(node, ast.Call | ast.Attribute) else ""
        loads = re.match(rf"{module}\.(load|loads|open|Unpickler)\b", call)
        opened = re.match(r"torch\.load\(", call) and "weights_only=True" not in call
        numpy = "allow_pickle=True" in call  # its own default is False
        yaml = re.match(r"yaml\.(load|unsafe_load|full_load)\(", call) and "=_Loader" not in call
        code = re.match(r"(eval|exec|os\.system|os\.popen)\(", call) or "shell=True" in call
        if loads or opened or numpy or yaml or code:
            found.append(call[:60])
    return found


def test_no_file_of_the_package_unpickles_or_runs_text() -> None:
    paths = [*ROOT.glob("seer_scale/**/*.py"), *ROOT.glob("launch/*.py")]
    assert len(paths) > 100
    # As torch's all_gather_object does: bytes of the ranks of this run, and of no file.
    ranks = ROOT / "seer_scale" / "distributed" / "collectives.py"
    found = {path: calls for path in paths if (calls := suspicious(path.read_text()))}
    assert found.pop(ranks) == ["pickle.loads(row[:n].tobytes())", "pickle.loads"]
    assert found == {}
    bad = "pickle.load(f); torch.load(f); np.load(f, allow_pickle=True); yaml.load(t, L); eval(t)"
    assert len(suspicious(bad)) >= 5


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_pickle_as_a_checkpoint_s_file_does_not_run(
    tmp_path: Path, marker: Path, how: str
) -> None:
    folder = tmp_path / "step_00000007"
    content = write_checkpoint(folder)
    buffer = io.BytesIO()
    torch.save(Bomb(marker), buffer)
    data = buffer.getvalue() if how == "torch" else pickle.dumps(Bomb(marker))
    (folder / "rank_00000.safetensors").write_bytes(data)
    content["files"]["rank_00000.safetensors"]["bytes"] = len(data)
    sealed(folder, content)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors is damaged"):
        CheckpointReader(folder)
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        CheckpointReader(folder)
    for name in ("trunk.safetensors", "config.json"):
        (tmp_path / "trunk").mkdir(exist_ok=True)
        (tmp_path / "trunk" / name).write_bytes(data)
    with pytest.raises(UserError):
        load(tmp_path / "trunk")
    assert not marker.exists()


def test_a_pickle_in_a_shard_or_as_a_manifest_does_not_run(tmp_path: Path, marker: Path) -> None:
    bomb = pickle.dumps(Bomb(marker))
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name in ("0.pkl", "0.pyd", "0.cls", "0.jpg", "1.npy", "1.jpg", "__pycache__/x.pyc"):
            member = tarfile.TarInfo(name)
            data = photo() if name == "0.jpg" else bomb
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = open_source(tmp_path / "s.tar")
    assert len(source) == 2
    assert [source.read(index) == photo() for index in (0, 1)] == [True, False]
    for name in ("m.jsonl", "m.parquet"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(DataError):
            open_source(tmp_path / name)
    assert not marker.exists()


def test_a_pickle_in_a_kept_index_does_not_run(tmp_path: Path, marker: Path) -> None:
    identity = Identity("x.tar", 10_240, "1")
    path = index_path(tmp_path, identity)
    array = np.array([Bomb(marker)], dtype=object)
    fields = dict.fromkeys(("identity", "images", "labels", "names", "name_ends"), array)
    with path.open("wb") as file:
        np.savez(file, allow_pickle=True, **fields)
    assert load_index(tmp_path, identity) is None
    path.write_bytes(pickle.dumps(Bomb(marker)))
    assert load_index(tmp_path, identity) is None
    assert not marker.exists()


SPECIAL = {
    "symbolic link": (tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": (tarfile.LNKTYPE, "../../etc/passwd"),
    "character device": (tarfile.CHRTYPE, ""),
    "block device": (tarfile.BLKTYPE, ""),
    "named pipe": (tarfile.FIFOTYPE, ""),
    "folder": (tarfile.DIRTYPE, ""),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_file_in_a_tar_is_no_image(tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        member = tarfile.TarInfo("evil.jpg")
        member.type, member.linkname = SPECIAL[kind]
        tar.addfile(member)
        good = tarfile.TarInfo("good.jpg")
        good.size = len(photo())
        tar.addfile(good, io.BytesIO(photo()))
    source = open_source(tmp_path / "s.tar")
    assert len(source) == 1
    assert source.read(0) == photo()


def test_names_in_a_tar_lead_nowhere(tmp_path: Path) -> None:
    """They are names only: nothing is ever unpacked."""
    names = ["../../../escaped.jpg", "/tmp/h/escaped.jpg", "a/../../b.jpg", "c:\\x.jpg", "~/x.jpg"]
    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "s.tar", "w") as tar:
        for seed, name in enumerate(names):
            member = tarfile.TarInfo(name)
            member.size = len(photo(seed))
            tar.addfile(member, io.BytesIO(photo(seed)))
    cache = Cache(tmp_path / "cache", 1 << 30)
    before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
    source = open_source(shards / "s.tar", cache)
    assert [source.read(index) for index in range(len(source))] == [photo(n) for n in range(5)]
    assert {path for path in tmp_path.rglob("*") if "cache" not in path.parts} == before
    assert not list(Path("/tmp").glob("escaped*"))
    texts = [path.read_text() for path in ROOT.glob("seer_scale/**/*.py")]
    assert not [text for text in texts if re.search(r"\.extract(all)?\(|unpack_archive", text)]


def test_a_key_given_twice_in_a_manifest_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"url": "a.tar", "count": 1, "bytes": 10240, "count": 2}\n')
    with pytest.raises(DataError, match="row 1 is not JSON: a key is given twice"):
        read_shards(str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"world_size": 10**9}, "it has no rank_00001"),
        ({"world_size": -1}, "it is of -1 ranks"),
        ({"files": {"../../../etc/passwd": {"bytes": 1, "xxh128": ""}}}, "not a file of the"),
        ({"files": {"/etc/passwd": {"bytes": 1, "xxh128": ""}}}, "not a file of the checkpoint"),
        ({"files": []}, "is damaged"),
        ({"step": "seven"}, "is damaged"),
    ],
)
def test_a_hostile_checkpoint_manifest_is_refused_at_once(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "step_00000007"
    content = write_checkpoint(folder)
    files = {**content["files"], **change.get("files", {})} if change.get("files") else []
    sealed(folder, {**content, **change, **({"files": files} if "files" in change else {})})
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=said):
        CheckpointReader(folder)
    assert time.monotonic() - began < 5


def test_a_huge_manifest_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000007"
    write_checkpoint(folder)
    with (folder / "manifest.json").open("r+b") as file:
        file.truncate(1 << 40)  # a hole: no bytes on the disk
    with pytest.raises(CheckpointError, match="too large"):
        CheckpointReader(folder)


def test_a_huge_header_is_not_read(tmp_path: Path) -> None:
    folder = tmp_path / "step_00000007"
    content = write_checkpoint(folder)
    path = folder / "rank_00000.safetensors"
    with path.open("r+b") as file:
        file.write((1 << 40).to_bytes(8, "little"))
        file.truncate(1 << 41)
    content["files"][path.name]["bytes"] = 1 << 41
    sealed(folder, content)
    with pytest.raises(CheckpointError, match="is damaged"):
        CheckpointReader(folder)


def test_every_command_that_starts_a_server_binds_to_loopback() -> None:
    patterns = ("README.md", "docs/*.md", "launch/**/*", "seer_scale/**/*.py", "Dockerfile")
    files = [path for pattern in patterns for path in ROOT.glob(pattern)]
    commands = [
        line
        for path in files
        if path.is_file()
        for line in path.read_text(errors="replace").splitlines()
        if re.search(r"mlflow server\s+-|mlflow ui\s+-", line)
    ]
    assert len(commands) >= 3
    assert all("--host 127.0.0.1" in line for line in commands), commands
    sources = "\n".join(path.read_text() for path in ROOT.glob("seer_scale/**/*.py"))
    assert "0.0.0.0" not in sources


def test_a_run_folder_holds_no_pickle(tmp_path: Path) -> None:
    """What this package writes is text, safetensors, PNG or NumPy without objects."""
    folder = tmp_path / "step_00000007"
    write_checkpoint(folder)
    for path in folder.rglob("*"):
        assert path.suffix in (".json", ".safetensors")
        data = path.read_bytes()
        assert not data.startswith((b"\x80", b"PK"))
    json.loads((folder / "manifest.json").read_text())
