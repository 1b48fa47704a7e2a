"""Shards at HTTP and S3, through a bad network: `remote`, `addresses`, `tars` and the cache."""

from __future__ import annotations

import errno
import multiprocessing
import os
import pickle
import random
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from seer_scale.data import index_report, remote
from seer_scale.data.addresses import is_remote, redact
from seer_scale.data.cache import Cache
from seer_scale.data.remote import Retry, fetch, stat
from seer_scale.data.shard_collections import open_shards
from seer_scale.data.shard_manifest import Shard, read_shards
from seer_scale.data.sources import open_source
from seer_scale.errors import DataError
from tests.data.servers import BadNetwork, FileServer, S3Server
from tests.data.test_shard_manifest import write_rows
from tests.data.test_sources import write_tar

PATIENT = Retry(tries=12, first=0.01, longest=0.2)
HASTY = Retry(tries=2, first=0.01, longest=0.01)
SHARDS, IMAGES = 4, 30


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    # Pieces as small beside these shards as real pieces are beside real shards.
    monkeypatch.setattr(remote, "PIECE", 64 << 10)
    monkeypatch.setattr(remote, "_SMALLEST_PIECE", 8 << 10)
    remote._system_of.cache_clear()
    yield
    remote._system_of.cache_clear()


@pytest.fixture
def sign_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")


@pytest.fixture(scope="module")
def originals() -> Any:
    """Content of every image, in order."""
    rng = np.random.default_rng(0)
    return [rng.bytes(int(rng.integers(2_000, 20_000))) for _ in range(SHARDS * IMAGES)]


@pytest.fixture
def folder(tmp_path: Path, originals: Any) -> Any:
    """Shards as files."""
    for number in range(SHARDS):
        numbers = range(number * IMAGES, (number + 1) * IMAGES)
        write_tar(tmp_path / f"s-{number}.tar", {f"{n:04}.jpg": originals[n] for n in numbers})
    return tmp_path


@pytest.fixture
def http(folder: Any) -> Any:
    server = FileServer(folder)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def s3_server() -> Any:
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Any, folder: Any, sign_in: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    endpoint = f"http://127.0.0.1:{s3_server.port}"
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="images")
    for path in folder.glob("*.tar"):
        client.put_object(Bucket="images", Key=f"some/{path.name}", Body=path.read_bytes())
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    return s3_server


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    return Cache(tmp_path / "cache", 1 << 30, PATIENT)


@pytest.fixture(params=["http", "s3"])
def shaky(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A server, the bad network before it, and the shards' address through that."""
    server = request.getfixturevalue(request.param)
    network = BadNetwork(server.port)
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{network.port}")
        yield server, network, "s3://images/some"
    else:
        yield server, network, f"http://127.0.0.1:{network.port}"
    network.stop()


def manifest_of(folder: Any, address: Any) -> Any:
    return [
        Shard(f"{address}/s-{n}.tar", IMAGES, (folder / f"s-{n}.tar").stat().st_size, None)
        for n in range(SHARDS)
    ]


def read_all(source: Any, threads: Any = 4) -> Any:
    """Every image once, in random order, by several threads."""
    order = random.Random(0).sample(range(len(source)), len(source))
    with ThreadPoolExecutor(threads) as pool:
        return dict(zip(order, pool.map(source.read, order), strict=True))


@pytest.mark.long
def test_every_image_survives_a_slow_and_cut_off_network(
    shaky: Any, folder: Any, cache: Any, originals: Any
) -> None:
    server, network, address = shaky
    source = open_shards(manifest_of(folder, address), cache)
    network.bytes_per_second = 1e6
    network.cut_every = 150_000
    over = threading.Event()

    def trouble() -> None:
        for step in range(100):
            if over.wait(0.15):
                return
            network.cut()
            if step % 3 == 1:
                server.stop()
                time.sleep(0.1)
                server.start()

    villain = threading.Thread(target=trouble)
    villain.start()
    try:
        images = read_all(source)
    finally:
        over.set()
        villain.join()
    assert [images[n] for n in range(len(originals))] == originals
    assert network.breaks >= SHARDS
    assert len(list((cache.folder / "shards").iterdir())) == SHARDS


def test_a_server_that_is_away_for_a_while(
    shaky: Any, folder: Any, cache: Any, originals: Any
) -> None:
    _, network, address = shaky
    source = open_shards(manifest_of(folder, address), cache)
    assert source.read(0) == originals[0]
    network.stop()
    comeback = threading.Timer(0.4, network.start)
    comeback.start()
    assert source.read(len(source) - 1) == originals[-1]
    comeback.join()


def test_a_broken_download_goes_on_where_it_stopped(
    shaky: Any, folder: Any, tmp_path: Path
) -> None:
    _, network, address = shaky
    url = f"{address}/s-0.tar"
    whole = (folder / "s-0.tar").read_bytes()
    there = stat(url, PATIENT)
    network.cut_every = 200_000
    with open(tmp_path / "copy", "w+b") as copy:
        fetch(url, there, copy.fileno(), PATIENT)
        assert copy.read() == whole
    assert network.breaks > 0
    assert network.sent < len(whole) + 80_000  # one piece, and headers


def test_a_shard_that_is_replaced_in_the_middle(http: Any, folder: Any, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{http.port}/s-0.tar"
    there = stat(url, HASTY)
    (folder / "s-0.tar").write_bytes(bytes(there.size))
    with open(tmp_path / "copy", "w+b") as copy, pytest.raises(OSError, match="replaced") as caught:
        fetch(url, there, copy.fileno(), PATIENT)
    assert caught.value.errno == errno.ESTALE


def test_a_server_without_ranges(http: Any, cache: Any, originals: Any) -> None:
    http.ranges = False
    source = open_source(f"http://127.0.0.1:{http.port}/s-{{0..3}}.tar", cache)
    images = read_all(source)
    assert [images[n] for n in range(len(originals))] == originals
    assert http.count("GET") == SHARDS


@pytest.mark.parametrize(
    ("statuses", "error", "requests"),
    [
        ([503, 429, 500], None, 0),
        ([404, 404], FileNotFoundError, 2),  # HEAD and GET
        ([403, 403], PermissionError, 2),
        ([503] * 20, OSError, 4),
    ],
)
def test_only_what_may_pass_is_tried_again(
    http: Any, statuses: Any, error: Any, requests: Any
) -> None:
    http.failures = list(statuses)
    url = f"http://127.0.0.1:{http.port}/s-0.tar"
    if error is None:
        assert stat(url, PATIENT).size
        return
    with pytest.raises(error, match=r"no such file|HTTP status") as caught:
        stat(url, HASTY)
    assert caught.value.strerror
    assert len(http.requests) == requests


def test_the_second_opening_reads_no_shard(http: Any, cache: Any, originals: Any) -> None:
    pattern = f"http://127.0.0.1:{http.port}/s-{{0..3}}.tar"
    first = open_source(pattern, cache)
    http.requests.clear()
    source = open_source(pattern, cache)
    assert {method for method, _, _ in http.requests} == {"HEAD"}
    assert source.version == first.version
    assert source.name(31) == f"http://127.0.0.1:{http.port}/s-1.tar[1]"
    assert source.read(31) == originals[31]
    assert source.name(31) == f"http://127.0.0.1:{http.port}/s-1.tar/0031.jpg"
    assert {method for method, _, _ in http.requests} == {"HEAD"}


def test_a_replaced_shard_is_indexed_anew(http: Any, folder: Any, cache: Any) -> None:
    pattern = f"http://127.0.0.1:{http.port}/s-0.tar"
    source = open_source(pattern, cache)
    write_tar(folder / "s-0.tar", {"1.jpg": b"new"})
    assert open_source(pattern, cache).read(0) == b"new"
    assert len(pickle.loads(pickle.dumps(source)).read(1)) > 1  # the old one is still there


def test_s3_patterns(s3: Any, cache: Any, originals: Any) -> None:
    for pattern in ("some/*.tar", "some/s-[0-3].tar", "some/s-{0..3}.tar", "**/s-?.tar"):
        source = open_source(f"s3://images/{pattern}", cache)
        assert source.shard_sizes.tolist() == [IMAGES] * SHARDS
        assert source.read(100) == originals[100]
    assert source.name(100) == "s3://images/some/s-3.tar/0100.jpg"


def test_remote_manifest(http: Any, folder: Any, cache: Any, originals: Any) -> None:
    address = f"http://127.0.0.1:{http.port}"
    lines: list[str] = []
    index_report.index(f"{address}/s-{{0..3}}.tar", cache, str(folder / "all.jsonl"), lines.append)
    assert len(lines) == SHARDS + 3
    shards = read_shards(str(folder / "all.jsonl"))
    assert all(
        shard.published and 0 < time.time() - shard.published.timestamp() < 60 for shard in shards
    )
    (folder / "deep").mkdir()
    rows = [{"url": f"../s-{n}.tar", "count": IMAGES, "bytes": shards[n].bytes} for n in (2, 0)]
    write_rows(folder / "deep/m.jsonl", *rows)
    source = open_source(f"{address}/deep/m.jsonl", cache)
    assert source.read(3) == originals[2 * IMAGES + 3]
    assert source.name(IMAGES).startswith(f"{address}/s-0.tar[")
    write_rows(folder / "deep/m.jsonl", {**rows[0], "url": "/etc/passwd"})
    with pytest.raises(DataError, match="column url is /etc/passwd: a remote manifest names no"):
        open_source(f"{address}/deep/m.jsonl", cache)


def read_in_child(source: Any, queue: Any) -> None:
    queue.put(source.read(95))


@pytest.mark.parametrize("pickled", [False, True])
def test_a_child_process_reads_too(
    http: Any, folder: Any, cache: Any, originals: Any, pickled: Any
) -> None:
    source = open_shards(manifest_of(folder, f"http://127.0.0.1:{http.port}"), cache)
    assert source.read(0) == originals[0]  # connections and threads are there before the fork
    if pickled:
        source = pickle.loads(pickle.dumps(source))
    context = multiprocessing.get_context("fork")  # others would import torch first
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(source, queue), daemon=True)
    child.start()
    assert queue.get(timeout=240) == originals[95]
    child.join()


def test_failures_are_remembered(
    http: Any, folder: Any, cache: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = manifest_of(folder, f"http://127.0.0.1:{http.port}")
    (folder / "s-1.tar").unlink()
    source = open_shards(shards, cache)
    for number in range(IMAGES):
        with pytest.raises(OSError, match="no such file on the server"):
            source.read(IMAGES + number)
    assert len(http.requests) == 2
    write_tar(folder / "s-1.tar", {"1.jpg": b"new"})
    monkeypatch.setattr("seer_scale.data.tars._FAILURE_SECONDS", 0.0)
    with pytest.raises(OSError, match=r"it has \d+ bytes instead of \d+"):
        source.read(IMAGES)


def closed_port() -> Any:
    server = FileServer(Path("nowhere"))
    server.stop()
    return server.port


BAD = {
    "no wildcards over HTTP": ("http://{http}/*.tar", r"HTTP servers list no files: use braces"),
    "missing on HTTP": (
        "http://{http}/x.tar",
        r"x\.tar does not exist: check the name and the ser",
    ),
    "nobody listens": (
        "http://127.0.0.1:{closed}/x.tar",
        r"server 127\S+ cannot be reached: .*x\.tar",
    ),
    "unknown host": ("http://nowhere.invalid/x.tar", r"server nowhere.invalid cannot be reached"),
    "one of several": ("http://{http}/s-{{0..4}}.tar", r"s-4\.tar does not exist"),
    "no tar": ("http://{http}/text.tar", r"text\.tar is neither an image folder nor a tar shard"),
    "compressed": ("http://{http}/z.tar", r"z\.tar is not a plain tar file .* unpacked first"),
    "brace": ("http://{http}/s-{{0..4.tar", r"has a brace that is not closed"),
    "unknown protocol": ("gopher://host/x.tar", r"has the unknown protocol gopher"),
    "package missing": ("gs://bucket/x.tar", r"cannot be read: .*[Ii]nstall gcsfs"),
    "chain": ("simplecache::http://{http}/s-0.tar", r"chains file systems"),
    "empty pattern": ("s3://images/other/*.tar", r"s3://images/other/\*\.tar matches nothing"),
    "no bucket": ("s3://nowhere/x.tar", r"s3://nowhere/x\.tar does not exist: .* bucket s3://now"),
    "no bucket to list": (
        "s3://nowhere/*.tar",
        r"s3://nowhere/\*\.tar (does not exist|matches no)",
    ),
    "S3 folder": ("s3://images/some", r"s3://images/some cannot be read: is a folder: name its"),
    "missing manifest": ("s3://images/m.jsonl", r"m\.jsonl does not exist"),
    "secrets": (
        "http://user:pass-word@{http}/x.tar?X-Amz-Signature=abc123",
        r"http://127\S+/x\.tar\?\.\.\. does not exist",
    ),
    "secrets, away": (
        "http://user:pass-word@127.0.0.1:{closed}/x.tar?X-Amz-Signature=abc123",
        r"server 127\S+ cannot be reached",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_each_fault_has_its_sentence(
    http: Any, s3: Any, folder: Any, tmp_path: Path, case: Any
) -> None:
    (folder / "text.tar").write_text("no tar " * 2000)
    write_tar(folder / "z.tar", {"1.jpg": b"1"}, "w:gz")
    pattern, sentence = BAD[case]
    url = pattern.format(http=f"127.0.0.1:{http.port}", closed=closed_port())
    with pytest.raises(DataError, match=sentence) as caught:
        open_source(url, Cache(tmp_path / "cache", 1 << 30, HASTY))
    text = str(caught.value)
    assert "\n" not in text
    assert not any(secret in text for secret in ("pass-word", "abc123", "very-secret"))


def test_missing_credentials(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    sentence = r"no credentials for s3://images/some/\S+: set AWS_ACCESS_KEY_ID .* or AWS_PROFILE"
    cache = Cache(tmp_path / "cache", 1 << 30, PATIENT)
    for name in ("s-0.tar", "*.tar"):
        with pytest.raises(DataError, match=sentence):
            open_source(f"s3://images/some/{name}", cache)
    row = {"url": "s3://images/some/s-0.tar", "count": 1, "bytes": 10240}
    with pytest.raises(DataError, match=sentence):
        open_source(write_rows(tmp_path / "m.jsonl", row), cache)


class Gate(ThreadingHTTPServer):
    """Passes requests on to a bucket, but answers as S3 does once one of the keys has expired."""

    expired: str | None = None

    def __init__(self, port: int) -> None:
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                key = self.headers.get("Authorization", "").partition("Credential=")[2]
                if gate.expired and key.startswith(f"{gate.expired}/"):
                    body = b"<Error><Code>ExpiredToken</Code><Message>expired</Message></Error>"
                    self.send_response(400)
                    headers = {"Content-Type": "application/xml", "Content-Length": str(len(body))}
                else:
                    inner = HTTPConnection("127.0.0.1", port, timeout=60)
                    inner.request(self.command, self.path, headers=dict(self.headers))
                    there = inner.getresponse()
                    body, headers = there.read(), dict(there.getheaders())
                    inner.close()
                    self.send_response_only(there.status)
                for name, value in headers.items():
                    if name.lower() not in ("connection", "transfer-encoding"):
                        self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = answer  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@pytest.fixture
def gate(s3: Any) -> Iterator[Gate]:
    server = Gate(s3.port)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_credentials_that_expire_are_read_again(
    gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, originals: Any
) -> None:
    """A file of credentials that somebody renews every hour, as identity services do."""
    file = tmp_path / "credentials"

    def sign(key: str) -> None:
        file.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key=s\n")

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{gate.server_port}")
    sign("first")
    source = open_source("s3://images/some/s-0.tar", Cache(tmp_path / "a", 1 << 30, HASTY))
    assert source.read(0) == originals[0]
    gate.expired = "first"
    # Young credentials are not read again: a refusal is then what it seems.
    with pytest.raises(DataError, match=r"s-1\.tar cannot be read"):
        open_source("s3://images/some/s-1.tar", Cache(tmp_path / "b", 1 << 30, HASTY))
    monkeypatch.setattr(remote, "_RENEWAL_SECONDS", 0.0)
    with pytest.raises(DataError, match=r"s-1\.tar cannot be read"):
        open_source("s3://images/some/s-1.tar", Cache(tmp_path / "c", 1 << 30, HASTY))
    sign("second")
    source = open_source("s3://images/some/s-1.tar", Cache(tmp_path / "d", 1 << 30, HASTY))
    assert source.read(0) == originals[IMAGES]


def test_an_unreachable_bucket(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(
        DataError, match=r"bucket s3://images cannot be reached: .*s-0.tar"
    ) as caught:
        open_source("s3://images/some/s-0.tar", Cache(tmp_path / "cache", 1 << 30, HASTY))
    assert "very-secret" not in str(caught.value)


def test_names_carry_no_secrets(http: Any, cache: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(f"http://user:word@127.0.0.1:{http.port}/s-0.tar?sig=1", cache)
    assert source.name(0) == f"http://127.0.0.1:{http.port}/s-0.tar?...[0]"
    assert source.read(0)
    for file in cache.folder.rglob("*"):
        assert "word" not in str(file)
        assert not file.is_file() or b"user:word" not in file.read_bytes()


def test_the_default_cache(http: Any, tmp_path: Path, originals: Any) -> None:
    source = open_source(f"http://127.0.0.1:{http.port}/s-1.tar")
    assert source.read(0) == originals[IMAGES]
    assert list((tmp_path / "home/seer-scale/shards/shards").glob("*.tar"))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@h/a.tar?X=1#f", "https://h/a.tar?..."),
        ("https://u:p@ss)w@h:1/a.tar", "https://h:1/a.tar"),
        ("s3://b/a-??.tar", "s3://b/a-??.tar"),
        ("abfs://c/a.tar?sig=1", "abfs://c/a.tar?..."),
        ("error 403, url='https://u:p@h/a?sig=1', for https://h/b?c", None),
        ("/local/a?b=1.tar", "/local/a?b=1.tar"),
    ],
)
def test_redaction(text: Any, shown: Any) -> None:
    expected = "error 403, url='https://h/a?...', for https://h/b?..."
    assert redact(text) == (expected if shown is None else shown)


def test_what_is_remote() -> None:
    assert [is_remote(p) for p in ("s3://b", "http://h/x", "a/b", "/a", "c:x", "//h/x")] == [
        True, True, False, False, False, False,
    ]  # fmt: skip


def test_waiting_doubles_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    for failures in range(1, 10):
        Retry(first=0.2, longest=5.0).wait(failures)
    for wait, longest in zip(waits, [0.2, 0.4, 0.8, 1.6, 3.2, 5, 5, 5, 5], strict=True):
        assert longest / 2 <= wait <= longest
