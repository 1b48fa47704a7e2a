"""The cache of remote shards: its limit, locks and faults, with several processes."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from harness.locks import RULES, environment_with
from seer_scale.data import remote
from seer_scale.data.cache import Cache, default_folder
from seer_scale.data.remote import Retry
from seer_scale.data.server_errors import ServerError, as_data_error
from seer_scale.data.sources import open_source
from seer_scale.errors import DataError
from tests.data.servers import BadNetwork, FileServer
from tests.data.test_sources import shard

QUICK = Retry(tries=3, first=0.01, longest=0.05)
SIZE = 100_000
FORK = multiprocessing.get_context("fork")  # others would import torch first


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    remote._system_of.cache_clear()


def test_the_default_folder_is_local_scratch_before_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"XDG_CACHE_HOME": "xdg", "SLURM_TMPDIR": "job", "TMPDIR": "node", "HOME": "home"}
    for name, folder in folders.items():
        (tmp_path / folder).mkdir()
        monkeypatch.setenv(name, str(tmp_path / folder))
    places = []
    for name in folders:
        places.append(default_folder().relative_to(tmp_path))
        monkeypatch.delenv(name)
    expected = ["xdg", "job", "node", "home/.cache"]
    assert places == [Path(place) / "seer-scale" / "shards" for place in expected]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "gone"))  # a job's folder that was deleted
    assert default_folder() == tmp_path / "home" / ".cache" / "seer-scale" / "shards"


@pytest.fixture
def server(tmp_path: Path) -> Any:
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * SIZE)
    server = FileServer(folder)
    yield server
    server.stop()


@pytest.fixture
def network(server: Any) -> Any:
    network = BadNetwork(server.port)
    yield network
    network.stop()


def url(server: Any, number: Any) -> Any:
    return f"http://127.0.0.1:{server.port}/{number}.tar"


def shards_in(cache: Any) -> Any:
    """First byte of every copy."""
    return sorted(path.read_bytes()[0] for path in (cache.folder / "shards").glob("*.tar"))


def parts_in(cache: Any) -> Any:
    return list((cache.folder / "shards").glob("*.part"))


def wait_for_part(cache: Any) -> None:
    deadline = time.monotonic() + 240  # the child imports torch first
    while not parts_in(cache):
        assert time.monotonic() < deadline, "no download begins"
        time.sleep(0.01)


def fetch_in_child(cache: Any, address: Any, queue: Any) -> None:
    queue.put(cache.local(address).read_bytes())


def test_many_processes_and_threads_share_one_download(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    queue = FORK.Queue()
    children = [
        FORK.Process(target=fetch_in_child, args=(cache, url(server, 1), queue), daemon=True)
        for _ in range(2)
    ]
    for child in children:
        child.start()
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(cache.local, [url(server, 1)] * 16))
    assert [queue.get(timeout=240) for _ in children] == [b"\1" * SIZE] * 2
    for child in children:
        child.join()
    assert len(set(paths)) == 1
    assert server.count("GET") == 1
    assert paths[0].read_bytes() == b"\1" * SIZE


def test_what_was_not_used_for_longest_goes_first(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 3 * SIZE + 100, QUICK)
    for number in (0, 1, 2, 0, 3):
        cache.local(url(server, number))
        time.sleep(0.02)  # file systems tell times in steps
        assert cache.used_bytes() <= cache.limit_bytes
    assert shards_in(cache) == [0, 2, 3]
    cache.local(url(server, 4))
    assert shards_in(cache) == [0, 3, 4]


def test_the_index_that_was_not_used_for_longest_goes_first(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    tars = [shard(tmp_path / f"{name}.tar", 0, 4) for name in "ab"]
    index_of = {}
    for age, tar in enumerate(tars):
        known = set(cache.indexes.iterdir())
        open_source(tar, cache)
        (index_of[tar],) = set(cache.indexes.iterdir()) - known
        os.utime(index_of[tar], (age, age))
    open_source(tars[0], cache)
    small = Cache(cache.folder, SIZE + cache.used_bytes() - 1, QUICK)
    small.local(url(server, 0))
    assert list(cache.indexes.iterdir()) == [index_of[tars[0]]]


def test_what_is_being_read_is_not_deleted(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 2 * SIZE, QUICK)
    cache.local(url(server, 0))
    oldest = cache.open(url(server, 0)).file
    for number in (1, 2, 3):
        cache.local(url(server, number))
        assert shards_in(cache) == [0, number]
    assert oldest.read() == bytes(SIZE)
    oldest.close()
    cache.local(url(server, 4))
    assert shards_in(cache) == [3, 4]


def test_a_copy_that_was_deleted_can_be_read_to_its_end(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    with cache.open(url(server, 5)).file as file:
        cache.local(url(server, 5)).unlink()
        assert file.read() == b"\5" * SIZE
    assert cache.local(url(server, 5)).read_bytes() == b"\5" * SIZE
    assert server.count("GET") == 2


def test_a_killed_download_leaves_nothing_that_hurts(
    server: Any, network: Any, tmp_path: Path
) -> None:
    cache = Cache(tmp_path / "cache", 3 * SIZE, QUICK)
    network.bytes_per_second = 20_000
    queue = FORK.Queue()
    child = FORK.Process(target=fetch_in_child, args=(cache, url(network, 1), queue), daemon=True)
    child.start()
    wait_for_part(cache)
    assert parts_in(cache)[0].stat().st_size == SIZE  # counts from its beginning
    cache.local(url(server, 2))
    assert parts_in(cache)  # somebody downloads it
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    cache.local(url(server, 3))
    assert not parts_in(cache)
    network.bytes_per_second = None
    assert cache.local(url(network, 1)).read_bytes() == b"\1" * SIZE


def test_a_killed_download_is_begun_anew(server: Any, network: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    network.bytes_per_second = 20_000
    child = FORK.Process(
        target=fetch_in_child, args=(cache, url(network, 1), FORK.Queue()), daemon=True
    )
    child.start()
    wait_for_part(cache)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    network.bytes_per_second = None
    assert cache.local(url(network, 1)).read_bytes() == b"\1" * SIZE
    assert not parts_in(cache)


def test_a_damaged_copy_is_downloaded_anew(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    os.truncate(cache.local(url(server, 1)), 10)
    assert cache.local(url(server, 1)).read_bytes() == b"\1" * SIZE


def test_size_and_tag_have_to_match(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    with pytest.raises(OSError, match="has 100000 bytes instead of 5"):
        cache.open(url(server, 1), size=5)
    with pytest.raises(OSError, match="has changed since it was indexed"):
        cache.open(url(server, 1), size=SIZE, tag="other")
    assert server.count("GET") == 0
    tag = remote.stat(url(server, 1), QUICK).tag
    cache.open(url(server, 1), size=SIZE, tag=tag).file.close()
    cache.open(url(server, 1), size=SIZE).file.close()
    cache.open(url(server, 1)).file.close()
    assert server.count("GET") == 1
    with pytest.raises(OSError, match="has changed"):
        cache.open(url(server, 1), size=SIZE, tag="other")


def test_a_failed_download_leaves_no_file(server: Any, network: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    network.cut_every = 1000
    with pytest.raises(OSError, match=r"\S"):
        cache.local(url(network, 1))
    assert not shards_in(cache)
    assert not parts_in(cache)


def fill_disk(cache: Any, address: Any, queue: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
    try:
        cache.local(address)
    except OSError as error:
        queue.put((type(error), str(error), list((cache.folder / "shards").iterdir())))


def test_a_full_disk_is_an_os_error(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    queue = FORK.Queue()
    child = FORK.Process(target=fill_disk, args=(cache, url(server, 1), queue), daemon=True)
    child.start()
    kind, text, left = queue.get(timeout=240)
    child.join()
    assert kind is OSError
    assert "no space for 100000 bytes" in text
    assert left == []
    assert server.count("GET") == 0


def test_readers_lock_in_shared_mode(server: Any, tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    cache.local(url(server, 1))
    with cache.open(url(server, 1)).file, cache.open(url(server, 1)).file as file:
        assert pickle.loads(pickle.dumps(cache)).local(url(server, 1)).read_bytes()
        with open(file.name, "rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


READER = """
import sys
from pathlib import Path
from seer_scale.data.cache import Cache
cache = Cache(Path(sys.argv[1]), 250_000)
for address in sys.argv[2:]:
    with cache.open(address).file as file:
        print(file.read(1)[0], end=" ")
"""


@pytest.mark.long
@pytest.mark.launch
@pytest.mark.parametrize("rule", RULES)
def test_without_locks_and_with_nfs_s_rule_it_works_too(
    server: Any, network: Any, tmp_path: Path, rule: str, request: pytest.FixtureRequest
) -> None:
    """What a killed download left goes, what another process downloads stays, to the limit."""
    network.bytes_per_second = 20_000
    environment = environment_with(rule) | {"no_proxy": "*"}
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    left = cache.folder / "shards" / "killed.part"
    left.write_bytes(bytes(10))

    def read(*urls: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", READER, str(cache.folder), *urls]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    slow = read(url(network, 1))
    request.addfinalizer(slow.kill)
    deadline = time.monotonic() + 240
    while server.count("GET") == 0:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    slow.send_signal(signal.SIGSTOP)  # in the middle of its download
    assert not left.exists()
    fast = read(url(server, 2), url(server, 3), url(server, 2))
    assert fast.communicate(timeout=240)[0] == "2 3 2 "
    assert fast.returncode == 0
    (part,) = parts_in(cache)  # slow's
    slow.send_signal(signal.SIGCONT)
    assert slow.communicate(timeout=240)[0] == "1 "
    assert slow.returncode == 0
    assert not part.exists()
    assert read(url(server, 4)).wait(240) == 0
    assert cache.used_bytes() <= 250_000


def test_a_fault_of_this_machine_is_not_blamed_on_the_server() -> None:
    """Whatever the system says about the copy; what the server says is another class of error."""
    address = "https://host/x.tar?token=secret"
    for number in (errno.EBADF, errno.ENOLCK, errno.EACCES, errno.ENOENT, errno.EIO, errno.ENOSPC):
        sentence = str(as_data_error(address, OSError(number, os.strerror(number), "/cache/x")))
        assert "server" not in sentence
        assert f"cannot be read: {os.strerror(number)} of /cache/x" in sentence
        assert "secret" not in sentence
        assert "server" in str(as_data_error(address, ServerError(errno.EIO, "reset", address)))


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the data cache .*/file/x cannot be written \(Not a dir"):
        Cache(tmp_path / "file/x", 10)
    with pytest.raises(DataError, match="is 0 bytes: it has to be positive"):
        Cache(tmp_path, 0)
