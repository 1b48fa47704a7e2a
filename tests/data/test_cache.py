import fcntl
import multiprocessing
import os
import pickle
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from seer_scale.data import remote
from seer_scale.data.cache import Cache
from seer_scale.data.remote import Retry
from seer_scale.errors import DataError
from tests.data.servers import BadNetwork, FileServer

QUICK = Retry(tries=3, first=0.01, longest=0.05)
SIZE = 100_000
FORK = multiprocessing.get_context("fork")  # others would import torch first


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    remote._system_of.cache_clear()


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.tar").write_bytes(bytes([number]) * SIZE)
    server = FileServer(folder)
    yield server
    server.stop()


@pytest.fixture
def network(server):
    network = BadNetwork(server.port)
    yield network
    network.stop()


def url(server, number):
    return f"http://127.0.0.1:{server.port}/{number}.tar"


def shards_in(cache):
    """First byte of every copy."""
    return sorted(path.read_bytes()[0] for path in (cache.folder / "shards").glob("*.tar"))


def parts_in(cache):
    return list((cache.folder / "shards").glob("*.part"))


def wait_for_part(cache):
    deadline = time.monotonic() + 30
    while not parts_in(cache):
        assert time.monotonic() < deadline, "no download begins"
        time.sleep(0.01)


def fetch_in_child(cache, address, queue):
    queue.put(cache.local(address).read_bytes())


def test_many_processes_and_threads_share_one_download(server, tmp_path):
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
    assert [queue.get(timeout=60) for _ in children] == [b"\1" * SIZE] * 2
    for child in children:
        child.join()
    assert len(set(paths)) == 1
    assert server.count("GET") == 1
    assert paths[0].read_bytes() == b"\1" * SIZE


def test_what_was_not_used_for_longest_goes_first(server, tmp_path):
    cache = Cache(tmp_path / "cache", 3 * SIZE + 100, QUICK)
    for number in (0, 1, 2, 0, 3):
        cache.local(url(server, number))
        time.sleep(0.02)  # file systems tell times in steps
        assert cache.used_bytes() <= cache.limit_bytes
    assert shards_in(cache) == [0, 2, 3]
    cache.local(url(server, 4))
    assert shards_in(cache) == [0, 3, 4]


def test_what_is_being_read_is_not_deleted(server, tmp_path):
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


def test_a_copy_that_was_deleted_can_be_read_to_its_end(server, tmp_path):
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    with cache.open(url(server, 5)).file as file:
        cache.local(url(server, 5)).unlink()
        assert file.read() == b"\5" * SIZE
    assert cache.local(url(server, 5)).read_bytes() == b"\5" * SIZE
    assert server.count("GET") == 2


def test_a_killed_download_leaves_nothing_that_hurts(server, network, tmp_path):
    cache = Cache(tmp_path / "cache", 3 * SIZE, QUICK)
    network.bytes_per_second = 20_000
    queue = FORK.Queue()
    child = FORK.Process(target=fetch_in_child, args=(cache, url(network, 1), queue), daemon=True)
    child.start()
    wait_for_part(cache)
    assert parts_in(cache)[0].stat().st_size == SIZE  # counts from its beginning
    cache.local(url(server, 2))
    assert parts_in(cache)  # somebody downloads it
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    cache.local(url(server, 3))
    assert not parts_in(cache)
    network.bytes_per_second = None
    assert cache.local(url(network, 1)).read_bytes() == b"\1" * SIZE


def test_a_killed_download_is_begun_anew(server, network, tmp_path):
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    network.bytes_per_second = 20_000
    child = FORK.Process(
        target=fetch_in_child, args=(cache, url(network, 1), FORK.Queue()), daemon=True
    )
    child.start()
    wait_for_part(cache)
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    network.bytes_per_second = None
    assert cache.local(url(network, 1)).read_bytes() == b"\1" * SIZE
    assert not parts_in(cache)


def test_a_damaged_copy_is_downloaded_anew(server, tmp_path):
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    os.truncate(cache.local(url(server, 1)), 10)
    assert cache.local(url(server, 1)).read_bytes() == b"\1" * SIZE


def test_size_and_tag_have_to_match(server, tmp_path):
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


def test_a_failed_download_leaves_no_file(server, network, tmp_path):
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    network.cut_every = 1000
    with pytest.raises(OSError, match=r"\S"):
        cache.local(url(network, 1))
    assert not shards_in(cache)
    assert not parts_in(cache)


def fill_disk(cache, address, queue):
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, SIZE // 2))
    try:
        cache.local(address)
    except OSError as error:
        queue.put((type(error), str(error), list((cache.folder / "shards").iterdir())))


def test_a_full_disk_is_an_os_error(server, tmp_path):
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    queue = FORK.Queue()
    child = FORK.Process(target=fill_disk, args=(cache, url(server, 1), queue), daemon=True)
    child.start()
    kind, text, left = queue.get(timeout=60)
    child.join()
    assert kind is OSError
    assert "no space for 100000 bytes" in text
    assert left == []
    assert server.count("GET") == 0


def test_readers_lock_in_shared_mode(server, tmp_path):
    cache = Cache(tmp_path / "cache", 1 << 30, QUICK)
    cache.local(url(server, 1))
    with cache.open(url(server, 1)).file, cache.open(url(server, 1)).file as file:
        assert pickle.loads(pickle.dumps(cache)).local(url(server, 1)).read_bytes()
        with open(file.name, "rb") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the data cache .*/file/x cannot be written \(Not a dir"):
        Cache(tmp_path / "file/x", 10)
    with pytest.raises(DataError, match="is 0 bytes: it has to be positive"):
        Cache(tmp_path, 0)
