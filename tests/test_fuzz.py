"""Whatever a stranger's file holds: one sentence or a sound result, never a crash (hypothesis).

350 cases in the quick suite, 20,300 in the slow one; the same ones every time.
"""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harness.jobs import RECIPES, ROOT
from seer_scale.checkpoint import CheckpointReader
from seer_scale.checkpoint.manifest import _checksum
from seer_scale.config import schema
from seer_scale.config.ds_config import ds_config_of
from seer_scale.config.recipe import parse
from seer_scale.data.shard_index import ShardIndex
from seer_scale.data.shard_manifest import read_shards
from seer_scale.errors import CheckpointError, ConfigError, DataError, UserError
from seer_scale.storage.tensor_file import Kind, Stamp, write_tensors
from seer_scale.train.state import TrainState

QUICK, SLOW = 50, 2900  # cases of each of seven properties
HOW_MANY = pytest.mark.parametrize(
    "cases",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(SLOW, id="slow", marks=[pytest.mark.slow, pytest.mark.timeout(3000)]),
    ],
)

NUMBERS = st.sampled_from(
    [0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**30, 1e308, -1e308, 5e-324, 0.5, float("nan"),
     float("inf"), float("-inf"), True, False]
)  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\0", "../../etc/passwd", "/etc/passwd", "s3://b/k", "http://u:p@h/x?s=1", "~", "*",
         "{0..9999999}", "x" * 300, "file:///etc/passwd", "__class__", "nan", "1e5", "null"]
    ),
)  # fmt: skip
JSON = st.recursive(
    st.one_of(st.none(), NUMBERS, TEXTS, st.integers(), st.floats()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)


def run(cases: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """Tries `check` on so many values."""

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def holds(value: Any) -> None:
        check(value)

    holds()


def one_sentence(error: UserError, most: int = 2000) -> None:
    """What every mistake ends in."""
    assert "\n" not in str(error), str(error)
    assert 10 < len(str(error)) < most, str(error)


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """`data` with some pieces cut out, written over, doubled or put in."""

    def change(edits: list[tuple[int, int, bytes, str]]) -> bytes:
        out = data
        for place, length, fresh, how in edits:
            at = place % (len(out) + 1)
            cut = {"insert": at, "double": at}.get(how, at + length)
            put = out[at : at + length] if how == "double" else fresh * (how != "cut")
            out = out[:at] + put + out[cut:]
        return out

    edit = st.tuples(
        st.integers(0, len(data)),
        st.integers(0, 200),
        st.one_of(st.binary(max_size=20), st.sampled_from([b"[" * 3000, b"-", b"9" * 40, b"\0"])),
        st.sampled_from(["cut", "over", "insert", "double"]),
    )
    return st.lists(edit, min_size=1, max_size=4).map(change)


# ------------------------------------------------------------------------------ configuration


@HOW_MANY
def test_overrides(cases: int) -> None:
    keys = st.one_of(st.sampled_from(sorted(schema.key_schemas())), st.text(max_size=12))
    values = st.one_of(TEXTS, JSON.map(lambda value: json.dumps(value)), st.text(max_size=40))
    argument = st.tuples(keys, values).map("=".join)

    def check(arguments: list[str]) -> None:
        with suppress(SystemExit):  # --help
            try:
                parse(["--recipe", "debug", *arguments], recipes=RECIPES, ranks=1)
            except ConfigError as error:
                one_sentence(error)

    run(cases, st.lists(argument, max_size=4), check)


@HOW_MANY
def test_recipe_files(cases: int, tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    tree = st.dictionaries(
        st.sampled_from([*schema.sections(), "recipe", "x"]),
        st.one_of(JSON, st.dictionaries(TEXTS, JSON, max_size=3)),
        max_size=3,
    ).map(lambda value: json.dumps(value).encode())

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            parse(["--recipe", str(path)], recipes=RECIPES, ranks=1)
        except ConfigError as error:
            one_sentence(error)

    run(cases, st.one_of(mutated((RECIPES / "debug.yaml").read_bytes()), tree), check)


def test_yaml_that_would_explode_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bomb.yaml"
    levels = [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, 12)]
    path.write_text("\n".join(["l0: &l0 lol", *levels]))
    for text in (path.read_text(), "[" * 100_000, "{a: " * 50_000):
        path.write_text(text)
        with pytest.raises(ConfigError, match="is not valid YAML") as raised:
            parse(["--recipe", str(path)], recipes=RECIPES, ranks=1)
        one_sentence(raised.value)


@HOW_MANY
def test_deepspeed_files(cases: int, tmp_path: Path) -> None:
    good = (ROOT / "ds_configs" / "zero3.json").read_bytes()
    path = tmp_path / "zero.json"
    config = parse(
        ["--recipe", "debug", "--deepspeed_config", str(path)], recipes=RECIPES, ranks=1
    ).config
    section = st.dictionaries(
        st.sampled_from(["stage", "offload_optimizer", "offload_param", "reduce_bucket_size", "x"]),
        JSON,
        max_size=3,
    )
    tree = st.dictionaries(
        st.sampled_from(["zero_optimization", "fp16", "bf16", "optimizer", "steps_per_print", "y"]),
        st.one_of(JSON, section),
        max_size=3,
    ).map(lambda value: json.dumps(value).encode())

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            ds_config_of(config, 2)
        except ConfigError as error:
            one_sentence(error)

    run(cases, st.one_of(mutated(good), tree), check)


# ---------------------------------------------------------------------------------- shards


def good_tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("0.jpg", "0.cls", "f/1.png", "ü" * 120 + ".jpg"):
            member = tarfile.TarInfo(name)
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes(700)))
    return buffer.getvalue()


FIELDS = {"name": (0, 100), "size": (124, 12), "type": (156, 1), "link": (157, 100),
          "magic": (257, 8), "mode": (100, 8), "prefix": (345, 155)}  # fmt: skip


def with_field(data: bytes, block: int, field: str, value: bytes) -> bytes:
    """A tar whose header in a block says something else, with the checksum to it."""
    start = 512 * (block % (len(data) // 512))
    begin, length = FIELDS[field]
    header = bytearray(data[start : start + 512])
    header[begin : begin + length] = value[:length].ljust(length, b"\0")
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return data[:start] + bytes(header) + data[start + 512 :]


@HOW_MANY
def test_tar_shards(cases: int, tmp_path: Path) -> None:
    path, good = tmp_path / "s.tar", good_tar()
    values = st.one_of(
        st.binary(max_size=155),
        st.sampled_from([b"../../../etc/x.jpg", b"/etc/x.jpg", b"77777777777", b"\xff" * 12, b"1",
                         b"2", b"3", b"S", b"x", b"g", b"L", b"K", b"\x80" + b"\x7f" * 11, b"-1"]),
    )  # fmt: skip
    edit = st.tuples(st.integers(0, len(good) // 512), st.sampled_from(sorted(FIELDS)), values)

    def edited(edits: list[tuple[int, str, bytes]]) -> bytes:
        data = good
        for block, field, value in edits:
            data = with_field(data, block, field, value)
        return data

    def check(data: bytes) -> None:
        path.write_bytes(data)
        with FileIO(path) as file:
            try:
                index = ShardIndex.build(file, str(path))
            except DataError as error:
                one_sentence(error)
                return
        assert (index.images >= 0).all()
        assert (index.images.sum(axis=1) <= len(data)).all()
        assert all(index.name(position) for position in range(len(index.images)))

    run(cases, st.one_of(mutated(good), st.lists(edit, min_size=1, max_size=3).map(edited)), check)


@HOW_MANY
def test_shard_manifests(cases: int, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    good = {"url": "a.tar", "count": 2, "bytes": 10_240, "published": "2024-05-01T00:00:00+00:00"}
    row = st.dictionaries(st.sampled_from([*good, "x"]), st.one_of(JSON, NUMBERS, TEXTS))
    rows = st.lists(row, max_size=3).map(
        lambda rows: "\n".join(json.dumps({**good, **row}) for row in rows).encode()
    )
    whole = b"".join(json.dumps({**good, "url": f"{n}.tar"}).encode() + b"\n" for n in range(3))

    def check(data: bytes) -> None:
        path.write_bytes(data)
        try:
            shards = read_shards(str(path))
        except DataError as error:
            one_sentence(error)
            return
        assert all(0 < shard.count * 512 <= shard.bytes for shard in shards)
        assert all(isinstance(shard.url, str) and shard.url.isprintable() for shard in shards)

    run(cases, st.one_of(mutated(whole), rows), check)


# ------------------------------------------------------------------------------- checkpoints


STATE = {"step": 7, "samples_seen": 56, "best_loss": 2.5, "collection": None, "losses": [2.5, 2.4]}


def sealed(folder: Path, content: dict[str, Any]) -> None:
    """Writes a manifest with the right checksum: its author means what it says."""
    whole = json.loads(json.dumps(content))
    text = json.dumps({**whole, "checksum": _checksum(whole)})
    (folder / "manifest.json").write_text(text)


def write_checkpoint(folder: Path) -> dict[str, Any]:
    """A small one; the manifest's contents."""
    folder.mkdir()
    values = {"weight/a": torch.arange(6.0), "momentum/a": torch.zeros(6)}
    kinds = {key: Kind(value.dtype, (6,)) for key, value in values.items()}
    placement = json.dumps({"a": {"shape": [2, 3], "offset": 0}})
    path = folder / "rank_00000.safetensors"
    stamp = write_tensors(path, kinds, values.__getitem__, {"placement": placement})
    content = {
        "format": 3,
        "step": 7,
        "world_size": 1,
        "trunk": "regnety_debug",
        "state": STATE,
        "files": {path.name: stamp._asdict()},
    }
    sealed(folder, content)
    return content


def read_checkpoint(folder: Path) -> None:
    """Reads all of it, or ends in a sentence."""
    try:
        reader = CheckpointReader(folder)
        problem = reader.verify()
        assert problem is None or "\n" not in problem
        for name in reader.names:
            assert reader.whole(name).numel() == reader.kinds[name].numel
        reader.local_states()
        state = TrainState.of(reader.manifest, folder)
        assert state.step >= 0
        assert state.samples_seen >= 0
    except CheckpointError as error:
        one_sentence(error)


@HOW_MANY
def test_checkpoint_manifests(cases: int, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    good = write_checkpoint(folder)
    places = [
        *[(key,) for key in good],
        *[("state", key) for key in STATE],
        ("files", "rank_00000.safetensors"),
        ("files", "../../../etc/passwd"),
        ("files", "rank_00000.safetensors", "bytes"),
    ]

    def check(edits: list[tuple[tuple[str, ...], Any]]) -> None:
        content = json.loads(json.dumps(good))
        for (*above, key), value in edits:
            place = content
            for name in above:
                place = place.get(name) if isinstance(place, dict) else None
            if isinstance(place, dict):
                place[key] = value
        sealed(folder, content)
        read_checkpoint(folder)

    edit = st.tuples(st.sampled_from(places), st.one_of(JSON, NUMBERS))
    run(cases, st.lists(edit, max_size=3), check)


@HOW_MANY
def test_checkpoint_files(cases: int, tmp_path: Path) -> None:
    """A rank's file of a hostile author: the manifest has the checksum of what is there."""
    folder = tmp_path / "c"
    good = write_checkpoint(folder)
    path = folder / "rank_00000.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])

    def edited(edits: list[tuple[str, str, Any]]) -> bytes:
        fresh = json.loads(json.dumps(header))
        for key, name, value in edits:
            if key == "__metadata__":
                text = value if isinstance(value, str) else json.dumps(value)
                fresh[key]["placement"] = text
            elif name == "whole":
                fresh[key] = value
            elif isinstance(fresh.get(key), dict):
                fresh[key][name] = value
        encoded = json.dumps(fresh).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]

    placement = st.fixed_dictionaries({"a": st.fixed_dictionaries({"shape": JSON, "offset": JSON})})
    edit = st.tuples(
        st.sampled_from(["weight/a", "momentum/a", "__metadata__", "local/x"]),
        st.sampled_from(["dtype", "shape", "data_offsets", "whole"]),
        st.one_of(JSON, st.lists(NUMBERS, max_size=3), placement),
    )

    def check(fresh: bytes) -> None:
        path.write_bytes(fresh)
        stamp = Stamp(len(fresh), xxhash.xxh3_128_hexdigest(fresh))
        sealed(folder, {**good, "files": {path.name: stamp._asdict()}})
        read_checkpoint(folder)

    edits = st.lists(edit, min_size=1, max_size=3).map(edited)
    run(cases, st.one_of(mutated(data), edits), check)
    shutil.rmtree(folder)


def test_the_slow_suite_has_twenty_thousand_cases() -> None:
    properties = [name for name, value in globals().items() if getattr(value, "pytestmark", None)]
    assert SLOW * len(properties) >= 20_000
