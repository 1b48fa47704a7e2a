"""launch/checkpoint.py on small checkpoints; and, slow, on one of ten billion parameters."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.jobs import ROOT
from seer_scale.checkpoint import CheckpointReader, list_checkpoints
from seer_scale.checkpoint.manifest import write_manifest
from seer_scale.commands.checkpoint import main
from seer_scale.errors import CheckpointError, UserError
from seer_scale.storage.tensor_file import Kind, TensorFile, write_tensors
from seer_scale.tracking.records import keep_knn
from tests.checkpoint.test_checkpoint import momentum_of, trained, write


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with the checkpoints of steps 10, 20 and 30."""
    for step in (10, 20, 30):
        write(tmp_path / "run" / "checkpoints", step, local={"rng.cpu": torch.get_rng_state()})
    return tmp_path / "run"


def test_inspect_is_a_table(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(run)]) == 0
    short = capsys.readouterr().out
    assert re.search(r"^step +30$", short, re.M)
    assert re.search(r"^recipe +test$", short, re.M)
    assert re.search(r"^files +4, 0.\d{3} GiB$", short, re.M)
    assert re.search(r"^of each rank +rng.cpu$", short, re.M)
    assert "prototypes.weight" not in short
    assert main(["inspect", str(run), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(short)
    assert re.search(r"^prototypes.weight +6x8 +float32 +48$", text, re.M)
    assert re.search(r"running_mean +32 +float32 buffer +32$", text, re.M)
    assert re.search(r"^rank_00000.safetensors +0.\d{3} +[0-9a-f]{16}$", text, re.M)


def test_list_has_a_line_for_each_checkpoint(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_knn(run, 20, {"top1": 0.25})
    (run / "checkpoints" / "step_00000010" / "manifest.json").write_text("{")
    assert main(["list", str(run)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[0] == "step"
    assert [row.split()[0] for row in rows] == ["10", "20", "30"]
    assert "is damaged" in rows[0]
    assert "yes" in rows[1]
    assert "25.00 %" in rows[1]
    assert rows[2].endswith(str(run / "checkpoints" / "step_00000030"))
    assert "%" not in rows[2]


@pytest.mark.parametrize("verb", ["list", "inspect", "verify"])
def test_a_folder_without_a_checkpoint_is_told_without_options(verb: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no whole checkpoint") as caught:
        main([verb, str(tmp_path)])
    assert "--" not in str(caught.value)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1000] ^= 4
    path.write_bytes(bytes(data))


def test_verify_finds_a_flipped_bit(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "checkpoints" / "step_00000020"
    assert main(["verify", str(folder)]) == 0
    assert "is whole: 4 files" in capsys.readouterr().out
    flip_a_bit(folder / "rank_00000.safetensors")
    with pytest.raises(UserError, match=r"rank_00000\.safetensors does not have the checksum"):
        main(["verify", str(folder)])
    assert main(["verify", str(run)]) == 0  # the newest


@pytest.mark.parametrize("files", [1, 3])
def test_consolidate_writes_whole_tensors(run: Path, tmp_path: Path, files: int) -> None:
    model, to = trained(), tmp_path / "out"
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    largest = ["--largest-file", str(size / 2.5 / 2**30)] if files > 1 else []
    assert main(["consolidate", str(run), "--to", str(to), *largest]) == 0
    written = sorted(to.glob("*.safetensors"))
    assert len(written) == files
    found = {key: value for path in written for key, value in load_file(path).items()}
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    if files > 1:
        index = json.loads((to / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == size
        for name, file in index["weight_map"].items():
            assert name in load_file(to / file)
    with pytest.raises(UserError, match=r"holds model.* already"):
        main(["consolidate", str(run), "--to", str(to)])


def test_consolidate_takes_momentum_along(run: Path) -> None:
    assert main(["consolidate", str(run), "--momentum"]) == 0
    path = run / "checkpoints" / "step_00000030_consolidated" / "model.safetensors"
    found, model = load_file(path), trained()
    for name, parameter in model.named_parameters():
        expected = momentum_of(parameter).view(parameter.shape)
        assert torch.equal(found[f"momentum/{name}"], expected), name
    assert "momentum/trunk.stem.1.running_mean" not in found
    # and it is no checkpoint
    assert [p.name[-2:] for p in list_checkpoints(run / "checkpoints")] == ["10", "20", "30"]


def test_prune_deletes_the_old_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run / "checkpoints"
    for more, left in ((["--dry-run"], [10, 20, 30]), (["--keep-every", "10"], [10, 20, 30])):
        assert main(["prune", str(run), "--keep", "1", *more]) == 0
        assert [int(path.name[5:]) for path in list_checkpoints(root)] == left
    assert "would delete" in capsys.readouterr().out
    assert main(["prune", str(root), "--keep", "1", "--keep-every", "20"]) == 0
    assert [int(path.name[5:]) for path in list_checkpoints(root)] == [20, 30]


def test_prune_keeps_all_while_the_newest_is_damaged(run: Path) -> None:
    root = run / "checkpoints"
    (root / "step_00000030" / "trunk" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        main(["prune", str(run), "--keep", "1"])
    assert len(list_checkpoints(root)) == 3


def test_prune_compares_the_checksums_of_the_newest(run: Path) -> None:
    root = run / "checkpoints"
    flip_a_bit(root / "step_00000030" / "rank_00000.safetensors")
    with pytest.raises(UserError, match=r"rank_00000\.safetensors .*; nothing is deleted"):
        main(["prune", str(run), "--keep", "1"])
    assert len(list_checkpoints(root)) == 3


def test_a_mistake_is_one_sentence(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "checkpoint.py"), "verify", str(tmp_path / "no")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "no: there is no such folder; give a run or one of its checkpoints" in done.stderr
    assert len(done.stderr.splitlines()) == 1


# ------------------------------------------------------------------------------ ten billion

LARGEST = 1 << 28  # elements of a tensor: 1 GiB
MEMORY_GIB = 4.0
# Not ru_maxrss, which a process takes over from the one that starts it.
WATCHED = """
import sys
from harness.resident import resident_bytes
from seer_scale.commands.checkpoint import main
status = main(sys.argv[1:])
print("peak", resident_bytes("VmHWM") / 2**30)
sys.exit(status)
"""


def write_large(folder: Path, elements: int, world_size: int) -> None:
    """A checkpoint of `elements` random float32 parameters, cut over ranks as ZeRO does."""
    sizes = [LARGEST] * (elements // LARGEST) + ([elements % LARGEST] if elements % LARGEST else [])
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    files = {}
    folder.mkdir(parents=True)
    for rank in range(world_size):
        cuts = {
            f"layer{index:03d}": (rank * size // world_size, (rank + 1) * size // world_size)
            for index, size in enumerate(sizes)
        }
        kinds = {
            f"weight/{name}": Kind(torch.float32, (high - low,))
            for name, (low, high) in cuts.items()
        }

        def read(key: str, kinds: dict[str, Kind] = kinds, rank: int = rank) -> torch.Tensor:
            count = kinds[key].numel
            tensor = torch.empty(count)
            for start in range(0, count, len(noise)):
                stop = min(count, start + len(noise))
                tensor[start:stop] = noise[: stop - start] + (start + rank)
            return tensor

        placement = {
            name: {"shape": [sizes[index]], "offset": low}
            for index, (name, (low, _)) in enumerate(cuts.items())
        }
        path = folder / f"rank_{rank:05d}.safetensors"
        files[path.name] = write_tensors(path, kinds, read, {"placement": json.dumps(placement)})
    content = {"step": 1, "world_size": world_size, "trunk": "made up"}
    write_manifest(folder, content, files)


def consolidated_peak(tmp_path: Path, elements: int, world_size: int, files: int) -> float:
    """GiB of memory that consolidating and verifying took at most."""
    folder, out = tmp_path / "step_00000001", tmp_path / "out"
    write_large(folder, elements, world_size)
    peaks = []
    for argv in (
        ["verify", str(folder)],
        ["consolidate", str(folder), "--to", str(out)]
        + (["--largest-file", str(elements * 4 / files / 2**30)] if files > 1 else []),
    ):
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, *argv],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(float(done.stdout.split()[-1]))
    reader = CheckpointReader(folder)
    joined = [TensorFile(path) for path in sorted(out.glob("*.safetensors"))]
    found = {name: file for file in joined for name in file.entries}
    assert found.keys() == reader.kinds.keys()
    for name, file in found.items():
        count = reader.kinds[name].numel
        # Across the borders of slices, and at the ends.
        for low in [
            0,
            count - 10,
            *(rank * count // world_size - 5 for rank in range(1, world_size)),
        ]:
            expected = reader.read(name, low, 10)
            assert torch.equal(file.read(name, low, low + 10), expected), name
    print(f"peak memory: verify {peaks[0]:.2f} GiB, consolidate {peaks[1]:.2f} GiB")
    return max(peaks)


@pytest.mark.long
def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    # Twelve tensors of 64 MiB: were all in memory at once, it would be 768 MiB more.
    global LARGEST
    before, LARGEST = LARGEST, 1 << 24
    try:
        peak = consolidated_peak(tmp_path, 12 << 24, 3, 1)
    finally:
        LARGEST = before
    idle = subprocess.run(
        [sys.executable, "-c", WATCHED, "verify", str(tmp_path / "step_00000001")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert peak < float(idle.stdout.split()[-1]) + 0.2


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_billion_parameters_pass_through_four_gib(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 2**30
    if free < 90:
        pytest.skip(f"needs 90 GiB of free disk, {tmp_path} has {free:.0f}")
    assert consolidated_peak(tmp_path, 10_000_000_000, 8, 4) < MEMORY_GIB
