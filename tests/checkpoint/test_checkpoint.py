"""Checkpoints: read in any cut, whole after a kill, one sentence for every damage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from harness.pool import Distributed
from seer_scale import distributed as ranks
from seer_scale.checkpoint import CheckpointReader, checkpoint_folder, find, list_checkpoints, save
from seer_scale.checkpoint.finding import checkpoints_at
from seer_scale.checkpoint.manifest import write_manifest
from seer_scale.checkpoint.reader import verify_together
from seer_scale.errors import CheckpointError
from seer_scale.models import build_model, initialise
from seer_scale.optim.filling import fill
from seer_scale.optim.slices import Slice
from seer_scale.serving import load_trunk
from seer_scale.storage.tensor_file import Kind, Stamp, write_tensors

TRUNK = "regnety_debug"


def build(head_dims: tuple[int, ...] = (16, 8), trunk: str = TRUNK) -> nn.Module:
    return build_model(trunk, head_dims=head_dims, head_batch_norm=True, prototypes=6)


def trained(seed: int = 0) -> nn.Module:
    """A model in which no two tensors are alike, BatchNorm statistics included."""
    model = build()
    initialise(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        with torch.no_grad():
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator))
            else:
                tensor.add_(7)
    return model


def momentum_of(value: Tensor) -> Tensor:
    """What stands for a tensor's momentum here: a function of its values."""
    return value.detach().flatten() * -3 + 1


def cut(model: nn.Module, rank: int, parts: int, *, uneven: bool = False) -> list[Slice]:
    """One rank's slices: equal lengths as ZeRO cuts them, or with borders at other places."""
    slices = []
    for name, parameter in model.named_parameters():
        numel = parameter.numel()
        borders = [min(numel, index * -(-numel // parts)) for index in range(parts + 1)]
        if uneven:
            borders[1:-1] = [border * 2 // 3 for border in borders[1:-1]]
        low, high = borders[rank], borders[rank + 1]
        if low < high:
            flat = parameter.detach().view(-1)
            momentum = momentum_of(parameter)
            slices.append(
                Slice(name, tuple(parameter.shape), low, flat[low:high], momentum[low:high])
            )
    return slices


def write(
    root: Path,
    step: int,
    *,
    model: nn.Module | None = None,
    keep: int = 3,
    whole: bool = False,
    local: dict[str, Tensor] | None = None,
) -> Path:
    """Saves as a trainer would, each rank its slice, or (`whole`) rank 0 everything."""
    model = trained() if model is None else model
    rank, world = (0, 1) if whole else (ranks.rank(), ranks.world_size())
    return save(
        root,
        step=step,
        slices=cut(model, rank, world) if not whole or ranks.is_main() else (),
        model=model,
        local_state={} if local is None else local,
        trunk=TRUNK,
        manifest={"state": {"step": step}, "config": {"recipe": "test"}},
        keep=keep,
    )


def write_on_ranks(root: Path, whole: bool) -> list[str]:
    """A save with local state; the names in this rank's file."""
    local = {"rng": torch.full((2,), ranks.rank()), "queue": torch.arange(6.0).view(2, 3)}
    folder = write(root, 5, whole=whole, local=local)
    assert folder.is_dir()  # on every rank, once save returns
    found = CheckpointReader(folder).local_state()
    assert found.keys() == local.keys()
    assert all(torch.equal(found[name], local[name]) for name in local)
    with safe_open(folder / f"rank_{ranks.rank():05d}.safetensors", framework="pt") as file:
        return list(file.keys())


@pytest.mark.parametrize(("world_size", "whole"), [(1, False), (2, False), (2, True)])
def test_what_is_read_is_what_was_written_in_any_cut(
    distributed: Distributed, tmp_path: Path, world_size: int, whole: bool
) -> None:
    if world_size == 1:  # without a process group
        write_on_ranks(tmp_path, whole)
    else:
        keys = distributed(write_on_ranks, world_size, tmp_path, whole)
        holds_weights = any(key.startswith(("weight/", "momentum/")) for key in keys[1])
        assert holds_weights != whole  # copies of another rank's slices are not written
        assert not any("running_mean" in key for key in keys[1])

    model = trained()
    reader = CheckpointReader(checkpoint_folder(tmp_path, 5))
    assert (reader.manifest["step"], reader.manifest["world_size"]) == (5, world_size)
    assert reader.manifest["config"] == {"recipe": "test"}

    copy = build()
    for tensor in [*copy.parameters(), *copy.buffers()]:
        tensor.detach().fill_(99)
    fill(copy, reader.values(copy))
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor), name

    for parts in (1, 3):  # other slices than were written
        for rank in range(parts):
            slices = cut(copy, rank, parts, uneven=True)
            expected = {s.name: s.momentum.clone() for s in slices}
            for part in slices:
                part.momentum.fill_(float("nan"))
            reader.fill_momentum(slices)
            for part in slices:
                assert torch.equal(part.momentum, expected[part.name]), part.name


def test_any_run_of_elements_can_be_read(tmp_path: Path) -> None:
    model = trained()
    reader = CheckpointReader(write(tmp_path, 1, model=model))
    flat = model.get_parameter("prototypes.weight").detach().flatten()
    for low, high in ((0, 48), (0, 1), (47, 48), (5, 30)):
        assert torch.equal(reader.read("prototypes.weight", low, high - low), flat[low:high])
    with pytest.raises(CheckpointError, match="holds 8 of the 20 elements asked of prototypes"):
        reader.read("prototypes.weight", 40, 20)


def test_the_trunk_beside_the_slices_loads_by_itself(tmp_path: Path) -> None:
    model = trained()
    folder = write(tmp_path, 1, model=model)
    loaded = load_trunk(folder / "trunk").state_dict()
    expected = {k[6:]: v for k, v in model.state_dict().items() if k.startswith("trunk.")}
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def write_with_own_statistics(root: Path) -> Tensor:
    model = trained()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.fill_(1 + 4 * ranks.rank())
    norm.running_var.fill_(2 + 6 * ranks.rank())
    write(root, 1, model=model)
    return torch.stack([norm.running_mean, norm.running_var])


def test_running_statistics_are_the_mean_over_ranks(
    distributed: Distributed, tmp_path: Path
) -> None:
    expected = torch.tensor([3.0, 5.0])[:, None].expand(2, 32)
    for statistics in distributed(write_with_own_statistics, 2, tmp_path):
        assert torch.equal(statistics, expected)
    folder = checkpoint_folder(tmp_path, 1)
    reader = CheckpointReader(folder)
    trunk = load_trunk(folder / "trunk")
    for kind, mean in zip(("running_mean", "running_var"), expected, strict=True):
        assert torch.equal(reader.whole(f"trunk.stem.1.{kind}"), mean)
        assert torch.equal(trunk.get_buffer(f"stem.1.{kind}"), mean)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = write(tmp_path, 1, local={"rng": torch.get_rng_state()})
    files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    assert files == [
        "manifest.json",
        "rank_00000.safetensors",
        "slices.json",
        "trunk/config.json",
        "trunk/trunk.safetensors",
    ]
    for name in files:
        data = (folder / name).read_bytes()
        if name.endswith(".json"):
            json.loads(data)
            continue
        # 8 bytes of length, a JSON header, then numbers to the last byte: no room for a pickle.
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__")
        assert max(t["data_offsets"][1] for t in header.values()) == len(data) - 8 - length
        numbers = sum(t["data_offsets"][1] - t["data_offsets"][0] for t in header.values())
        assert numbers == len(data) - 8 - length


# ------------------------------------------------------------------------------ keep and kill


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_the_last_k_stay(tmp_path: Path) -> None:
    model = trained()
    for step in (5, 10, 15, 100):
        write(tmp_path, step, model=model, keep=2)
    assert names(tmp_path) == ["step_00000015", "step_00000100"]
    assert list_checkpoints(tmp_path) == [checkpoint_folder(tmp_path, s) for s in (15, 100)]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    write(tmp_path, 5, model=trained(seed=0))
    folder = write(tmp_path, 5, model=(again := trained(seed=1)))
    # the first one is set aside, not lost
    assert names(tmp_path) == ["step_00000005", "superseded_step_00000005"]
    weight = CheckpointReader(folder).whole("prototypes.weight")
    assert torch.equal(weight, again.get_parameter("prototypes.weight"))


def test_what_was_just_saved_stays_whatever_later_steps_an_earlier_attempt_left(
    tmp_path: Path,
) -> None:
    model = trained()
    for step in (5, 15, 20):
        write(tmp_path, step, model=model)
    # Resumed from step 5 by its path: steps 15 and 20 are another future.
    folder = write(tmp_path, 10, model=model, keep=2)
    assert folder.is_dir()
    assert find("auto", tmp_path)[0] == folder


KILLED = """
import sys, time
from pathlib import Path
import seer_scale.checkpoint.rank_files as rank_files, seer_scale.serving as serving
from tests.checkpoint.test_checkpoint import trained, write

root, module = Path(sys.argv[1]), {"slices": rank_files, "trunk": serving}[sys.argv[2]]
write(root, 1, model=trained(seed=1))
original = module.stream_tensors

def slow(path, *args):
    original(path, *args)
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    print("half", flush=True)
    time.sleep(600)

module.stream_tensors = slow
write(root, 2, model=trained(seed=2))
"""


@pytest.mark.long
@pytest.mark.parametrize("moment", ["slices", "trunk"])
def test_a_save_killed_in_the_middle_leaves_what_was_whole(tmp_path: Path, moment: str) -> None:
    root = tmp_path / "checkpoints"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root), moment],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    with process:
        said = process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    assert said == "half\n"
    assert process.returncode == -signal.SIGKILL
    assert any(path.name not in ("step_00000001",) for path in root.iterdir())  # half of step 2

    # The trunk is written last, so its death takes nothing that resuming needs.
    steps = [1] if moment == "slices" else [1, 2]
    assert list_checkpoints(root) == [checkpoint_folder(root, step) for step in steps]
    for resume in ("auto", str(root), str(tmp_path)):
        assert find(resume, root)[0] == checkpoint_folder(root, steps[-1])
    assert not (checkpoint_folder(root, 2) / "trunk").exists()
    restored, reader = build(), CheckpointReader(checkpoint_folder(root, steps[-1]))
    assert reader.verify() is None
    fill(restored, reader.values(restored))
    previous = trained(seed=steps[-1]).state_dict()
    assert all(torch.equal(value, previous[name]) for name, value in restored.state_dict().items())

    write(root, 2, model=(model := trained(seed=2)))
    assert list_checkpoints(root) == [checkpoint_folder(root, step) for step in (1, 2)]
    assert not list(root.glob(".*"))
    fill(restored, CheckpointReader(checkpoint_folder(root, 2)).values(restored))
    expected = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in restored.state_dict().items())


# ----------------------------------------------------------------------------------- find


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 9 and 10."""
    run = tmp_path_factory.mktemp("run")
    for step in (9, 10):
        write(run / "checkpoints", step)
    (run / "checkpoints" / ".step_00000011.partial").mkdir()
    (run / "checkpoints" / "step_12").mkdir()
    return run


@pytest.mark.parametrize(
    ("given", "step"),
    [("auto", 10), (".", 10), ("checkpoints", 10), ("checkpoints/step_00000009", 9)],
)
def test_resume_means(run_dir: Path, given: str, step: int) -> None:
    root = run_dir / "checkpoints"
    resume = given if given == "auto" else str(run_dir / given)
    assert find(resume, root)[0] == checkpoint_folder(root, step)


def test_a_checkpoint_may_be_renamed(run_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(run_dir / "checkpoints" / "step_00000009", tmp_path / "best")
    assert find(str(tmp_path / "best"), tmp_path / "nowhere") == [tmp_path / "best"]
    CheckpointReader(tmp_path / "best")


def test_auto_without_a_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert find("auto", tmp_path / "missing") == []
    assert find("auto", tmp_path) == []


@pytest.mark.parametrize("kind", ["missing", "empty", "file", "partial"])
def test_a_path_without_a_checkpoint_says_so(tmp_path: Path, kind: str) -> None:
    path = tmp_path / kind
    if kind == "file":
        path.write_text("no folder")
    elif kind != "missing":
        path.mkdir()
    if kind == "partial":
        (path / "checkpoints" / ".step_00000003.partial").mkdir(parents=True)
    expected = "there is no such folder" if kind == "missing" else "holds no whole checkpoint"
    with pytest.raises(CheckpointError, match=expected) as caught:
        find(str(path), tmp_path)
    assert str(caught.value).startswith(f"--resume {path}: ")
    assert "auto" in str(caught.value)
    # A command that was given a path alone speaks of the path alone.
    with pytest.raises(CheckpointError, match=expected) as caught:
        checkpoints_at(str(path))
    assert str(caught.value).startswith(f"{path}: ")
    assert "--" not in str(caught.value).replace(str(path), "")
    assert "auto" not in str(caught.value).replace(str(path), "")


# ---------------------------------------------------------------------------------- damage


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in manifest.items() if v is not ...}))


def sign(folder: Path, **changes: Any) -> None:
    """As `edit`, by somebody who knows how the manifest is signed."""
    manifest = json.loads((folder / "manifest.json").read_text()) | changes
    manifest = {k: v for k, v in manifest.items() if v is not ... and k != "checksum"}
    stamps = {name: Stamp(**fields) for name, fields in manifest.pop("files", {}).items()}
    write_manifest(folder, manifest, stamps)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def truncate(folder: Path) -> None:
    with (folder / "rank_00000.safetensors").open("r+b") as file:
        file.truncate(1000)


def scramble(folder: Path) -> None:
    with (folder / "rank_00000.safetensors").open("r+b") as file:
        file.write(b"\xff" * 64)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an empty folder": (empty, "not a whole checkpoint: it has no manifest.json"),
    "no folder": (shutil.rmtree, "not a whole checkpoint: it has no manifest.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "it has no manifest.json"),
    "a cut rank file": (truncate, r"rank_00000.safetensors is 1000 bytes long instead of \d{5,}"),
    "no rank file": (
        lambda f: (f / "rank_00000.safetensors").unlink(),
        "rank_00000.safetensors is missing",
    ),
    "a scrambled header": (scramble, r"rank_00000.safetensors is damaged \(.+older checkpoint"),
    "half a manifest": (
        lambda f: (f / "manifest.json").write_text('{"format": 1, "wor'),
        "manifest.json is damaged",
    ),
    "binary in the manifest": (
        lambda f: (f / "manifest.json").write_bytes(b"\xff\xfe\x00"),
        "manifest.json is damaged",
    ),
    "a list as manifest": (lambda f: (f / "manifest.json").write_text("[]"), "is damaged"),
    "an edited manifest": (lambda f: edit(f, step=12), "damaged .*not have the checksum"),
    "a manifest without files": (lambda f: sign(f, files=...), "it has no rank_00000"),
    "a world size in words": (lambda f: sign(f, world_size="two"), "is damaged.*two"),
    "more ranks": (lambda f: sign(f, world_size=3), "it has no rank_00001.safetensors"),
    "another step": (lambda f: sign(f, step=8), "holds step 8 under the name of another"),
    "other sizes": (
        lambda f: sign(f, files={"rank_00000.safetensors": {"bytes": 12, "xxh128": ""}}),
        r"rank_00000.safetensors is \d+ bytes long instead of 12",
    ),
    "a newer format": (lambda f: edit(f, format=4), "format 4 .* reads up to 3: update seer_scale"),
    "an older format": (lambda f: edit(f, format=2), "format 2, of a version before the first"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_one_sentence(run_dir: Path, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "step_00000009"
    shutil.copytree(run_dir / "checkpoints" / folder.name, folder)
    inflict, expected = DAMAGES[damage]
    inflict(folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        CheckpointReader(folder).whole("prototypes.weight")  # headers are read when needed
    sentence = str(caught.value)
    assert str(folder) in sentence
    assert "\n" not in sentence
    # found by name as well: what is wrong with it is said by the reader, not hidden
    if folder.exists():
        assert find(str(folder), tmp_path) == [folder]


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (
            lambda: build(head_dims=(16, 4)),
            [r"3 tensors differ", r"prototypes.weight is \[6, 8\] instead of \[6, 4\]"],
        ),
        (lambda: build(head_dims=(8,)), ["is not in the model", "head.layers.0.weight"]),
        (lambda: build(head_dims=(16, 8, 8)), ["is missing"]),
        (
            lambda: build(trunk="regnety_200mf"),
            [r"another model \(regnety_debug\): \d{3} tensors differ", "trunk.trunk_output"],
        ),
    ],
)
def test_another_model_is_refused_by_what_differs(
    run_dir: Path, other: Callable[[], nn.Module], expected: list[str]
) -> None:
    model = other()
    initialise(model, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        fill(model, CheckpointReader(run_dir / "checkpoints" / "step_00000009").values(model))
    for part in expected:
        assert caught.match(part)
    assert caught.match("resume with the recipe and model.\\* keys it was made with")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_slices_that_leave_a_gap_or_overlap_are_refused(tmp_path: Path) -> None:
    """Two ranks hold four elements each of ten, and of eight; the files themselves are whole."""

    def read(numel: int, offset: int) -> CheckpointReader:
        for rank, start in enumerate((0, offset)):
            place = {"a": {"shape": [numel], "offset": start}}
            write_tensors(
                tmp_path / f"rank_{rank:05d}.safetensors",
                {"weight/a": Kind(torch.float32, (4,))},
                lambda _: torch.ones(4),
                {"placement": json.dumps(place)},
            )
        return CheckpointReader(tmp_path, {"world_size": 2, "files": {}})

    assert read(8, 4).whole("a").tolist() == [1.0] * 8
    for numel, offset, at in ((10, 6, 4), (6, 2, 2)):
        with pytest.raises(CheckpointError, match=f"leave a gap or overlap at element {at}"):
            read(numel, offset)
    with pytest.raises(CheckpointError, match="it holds 8 of the 9 elements of a"):
        read(9, 4)


def test_damage_of_any_file_is_found_before_a_run_resumes(tmp_path: Path) -> None:
    folder = write(tmp_path, 7, model=trained())
    names = sorted(CheckpointReader(folder).manifest["files"])
    assert len(names) == 4
    assert verify_together(CheckpointReader(folder)) is None
    for name in names:
        good = (folder / name).read_bytes()
        (folder / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        expected = f"{name} does not have the checksum it was written with"
        if name == "slices.json":
            with pytest.raises(CheckpointError, match=r"slices.json is damaged \(it does not have"):
                CheckpointReader(folder)
        else:
            reader = CheckpointReader(folder)
            assert reader.verify() == expected
            # Resuming needs no trunk, and does not read it.
            needed = not name.startswith("trunk/")
            assert verify_together(reader) == (expected if needed else None)
        (folder / name).write_bytes(good)
