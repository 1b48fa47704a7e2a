"""Checkpoints as slices: every rank writes what it holds, under canonical names, as safetensors.

A checkpoint is a folder `step_<8 digits>` that appears by one rename once all of it is on disk, so
a killed save leaves the previous one as it was. Reading copies any run of elements of any tensor,
whatever slices they were written in. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from seer_scale.errors import CheckpointError, UserError
from seer_scale.parallel import distributed
from seer_scale.parallel.batchnorm import average_running_statistics
from seer_scale.records import METRICS
from seer_scale.serving import export_trunk
from seer_scale.slices import Slice, Values

FORMAT = 1
MANIFEST = "manifest.json"
FOLDER = re.compile(r"step_(\d{8})")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` stands or will stand."""
    return root / f"step_{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Whole checkpoints under `root`, oldest first; a save that was killed is not among them."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if FOLDER.fullmatch(path.name))


def save(
    root: Path,
    *,
    step: int,
    slices: Iterable[Slice],
    writes_slices: bool,
    model: nn.Module,
    local_state: Mapping[str, Tensor],
    trunk: str,
    manifest: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes one checkpoint; every rank calls it. Older ones beyond `keep` go afterwards.

    Args:
        root: folder of the run's checkpoints, on a file system that all ranks see.
        step: steps done.
        slices: this rank's master weights and momenta.
        writes_slices: False on ranks whose slices are copies of another rank's.
        model: for its buffers; running statistics are averaged over the ranks first.
        local_state: tensors that each rank has its own of, such as the objective's queue.
        trunk: name of the trunk, exported beside the slices into `trunk/`.
        manifest: JSON values describing the run; what resuming compares.
        keep: how many checkpoints stay.
    """
    average_running_statistics(model)
    folder = checkpoint_folder(root, step)
    partial = root / f".{folder.name}.partial"
    if distributed.is_main():
        for stale in root.glob(".step_*"):  # of saves and deletions that were killed
            shutil.rmtree(stale, ignore_errors=True)
        partial.mkdir(parents=True)
    distributed.barrier()
    _write_rank(partial, slices if writes_slices else (), model, local_state)
    distributed.barrier()
    if distributed.is_main():
        _finish(partial, step, trunk, manifest)
        _publish(partial, folder)
        saved = list_checkpoints(root)
        here = saved.index(folder)
        for later in saved[here + 1 :]:  # of an attempt that was resumed from before them
            _set_aside(later)
        for old in saved[: max(0, here + 1 - keep)]:
            # Renamed first: a kill in mid-deletion must not leave half a checkpoint by its name.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.deleting")))
    distributed.barrier()
    return folder


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.safetensors"


def _write_rank(
    folder: Path, slices: Iterable[Slice], model: nn.Module, local_state: Mapping[str, Tensor]
) -> None:
    tensors: dict[str, Tensor] = {}
    placement: dict[str, Any] = {}
    for part in slices:
        tensors[f"weight/{part.name}"] = part.values
        tensors[f"momentum/{part.name}"] = part.momentum
        placement[part.name] = {"shape": part.shape, "offset": part.offset}
    if distributed.is_main():
        for name, buffer in model.named_buffers():
            tensors[f"weight/{name}"] = buffer.reshape(-1)
            placement[name] = {"shape": tuple(buffer.shape), "offset": 0}
    tensors |= {f"local/{name}": tensor for name, tensor in local_state.items()}
    # A copy: views into one storage, or of a GPU's memory, are nothing that can be written.
    copies = {key: value.detach().cpu().clone() for key, value in tensors.items()}
    path = _rank_file(folder, distributed.rank())
    save_file(copies, path, metadata={"placement": json.dumps(placement)})
    _sync(path)


def _finish(folder: Path, step: int, trunk: str, manifest: Mapping[str, Any]) -> None:
    world_size = distributed.world_size()
    content = {"format": FORMAT, "step": step, "world_size": world_size, "trunk": trunk, **manifest}
    files = [_rank_file(folder, rank) for rank in range(world_size)]
    content["files"] = {file.name: file.stat().st_size for file in files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")
    # From the files just written: they are whole under every strategy, the model need not be.
    reader = CheckpointReader(folder)
    state = {
        name.removeprefix("trunk."): reader.whole(name)
        for name in reader.names
        if name.startswith("trunk.")
    }
    export_trunk(state, folder / "trunk", trunk=trunk, step=step)
    for path in [folder / MANIFEST, *(folder / "trunk").iterdir(), folder / "trunk"]:
        _sync(path)


def _publish(partial: Path, folder: Path) -> None:
    _sync(partial)
    if folder.exists():
        _set_aside(folder)
    partial.rename(folder)
    _sync(folder.parent)


def _set_aside(folder: Path) -> None:
    """Renames a checkpoint that a resumed run overtakes: out of the way, not lost."""
    aside = folder.with_name(f"superseded_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def choose(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint a run starts from, or None for a fresh one; protects a run that is there.

    Raises:
        UserError: without `--resume`, if `run_dir` already holds a run.
        CheckpointError: if `--resume` names no checkpoint.
    """
    root = run_dir / "checkpoints"
    found = find(resume, root) if resume is not None else None
    inside = found is not None and found.resolve().is_relative_to(run_dir.resolve())
    saved = list_checkpoints(root)
    used = bool(saved) or (run_dir / METRICS).exists()
    if used and resume != "auto" and not inside:
        last = saved[-1].name if saved else "no checkpoint yet"
        raise UserError(
            f"run.dir={run_dir} already holds a run ({last}): go on with --resume auto or give "
            "another run.dir"
        )
    return found


def find(resume: str, root: Path) -> Path | None:
    """The checkpoint that `--resume` means: `auto` (newest in `root`, or None), or a path.

    A path may be a checkpoint, a run folder or its `checkpoints` folder.

    Raises:
        CheckpointError: if a path holds no checkpoint.
    """
    if resume == "auto":
        found = list_checkpoints(root)
        return found[-1] if found else None
    path = Path(resume)
    if not path.exists():
        raise CheckpointError(
            f"--resume {resume}: there is no such folder; give a run, one of its "
            "checkpoints (runs/NAME/checkpoints/step_XXXXXXXX) or auto"
        )
    if (path / MANIFEST).is_file() or FOLDER.fullmatch(path.name):
        return path
    found = list_checkpoints(path) or list_checkpoints(path / "checkpoints")
    if not found:
        raise CheckpointError(
            f"--resume {resume}: the folder holds no whole checkpoint; give a "
            "run, one of its checkpoints or auto"
        )
    return found[-1]


class CheckpointReader:
    """Reads any part of any tensor of one checkpoint.

    Raises:
        CheckpointError: if the folder is empty, half written, damaged or of a later format.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = _read_manifest(folder)
        # name -> (file, offset, length) of each slice, and the whole tensor's shape
        self._slices: dict[str, list[tuple[Path, int, int]]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for rank in range(self.manifest["world_size"]):
            self._index(_rank_file(folder, rank))

    @property
    def names(self) -> list[str]:
        """Parameters and buffers, in no particular order."""
        return list(self.shapes)

    def read(self, name: str, offset: int, length: int, kind: str = "weight") -> Tensor:
        """Elements `offset` to `offset + length` of a tensor, flat; `kind` weight or momentum."""
        out: Tensor | None = None
        filled = 0
        for path, start, count in self._slices[name]:
            low, high = max(start, offset), min(start + count, offset + length)
            if low >= high:
                continue
            with safe_open(path, framework="pt") as file:
                part = file.get_slice(f"{kind}/{name}")[low - start : high - start]
            out = part.new_empty(length) if out is None else out
            out[low - offset : high - offset] = part
            filled += high - low
        if out is None or filled != length:
            raise CheckpointError(
                f"{self.folder} holds {filled} of the {length} elements asked of {name}"
            )
        return out

    def whole(self, name: str) -> Tensor:
        """A whole parameter or buffer."""
        shape = self.shapes[name]
        return self.read(name, 0, torch.Size(shape).numel()).view(shape)

    def check(self, model: nn.Module) -> None:
        """Compares names and shapes with those of `model`, which may be on meta.

        Raises:
            CheckpointError: if the checkpoint is another model's; names the differences.
        """
        tensors = _tensors(model)
        differences = [
            *(f"{name} is missing" for name in tensors.keys() - self.shapes.keys()),
            *(f"{name} is not in the model" for name in self.shapes.keys() - tensors.keys()),
            *(
                f"{name} is {list(self.shapes[name])} instead of {list(tensor.shape)}"
                for name, tensor in tensors.items()
                if self.shapes.get(name, tuple(tensor.shape)) != tuple(tensor.shape)
            ),
        ]
        if differences:
            raise CheckpointError(
                f"{self.folder} is a checkpoint of another model ({self.manifest.get('trunk')}): "
                f"{len(differences)} tensors differ ({'; '.join(sorted(differences)[:3])}); resume "
                "with the recipe and model.* keys it was made with"
            )

    def values(self, model: nn.Module) -> Values:
        """Where a model takes its values from: any run of elements of any parameter or buffer.

        Raises:
            CheckpointError: as `check` does.
        """
        self.check(model)
        return lambda name, start, stop: self.read(name, start, stop - start)

    @torch.no_grad()
    def fill_momentum(self, slices: Iterable[Slice]) -> None:
        """Copies the optimizer state into a rank's slices, however they are cut."""
        for part in slices:
            part.momentum.copy_(
                self.read(part.name, part.offset, part.values.numel(), kind="momentum")
            )

    def local_state(self) -> dict[str, Tensor]:
        """What this rank saved as its own."""
        with safe_open(_rank_file(self.folder, distributed.rank()), framework="pt") as file:
            return {
                key.removeprefix("local/"): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 (no mapping)
                if key.startswith("local/")
            }

    def _index(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                placement = json.loads(file.metadata()["placement"])
                for name, place in placement.items():
                    count = file.get_slice(f"weight/{name}").get_shape()[0]
                    self._slices.setdefault(name, []).append((path, place["offset"], count))
                    self.shapes[name] = tuple(place["shape"])
        except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged ({error}); resume from an older checkpoint"
            ) from None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name: all that a checkpoint holds of a model."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        form, world_size, files = (
            int(manifest["format"]),
            int(manifest["world_size"]),
            dict(manifest["files"]),
        )
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} is no whole checkpoint: it has no {MANIFEST}; resume from another one"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error})") from None
    if form > FORMAT:
        raise CheckpointError(
            f"{folder} has format {form} and this version reads up to {FORMAT}: update seer_scale"
        )
    for rank in range(world_size):
        path = _rank_file(folder, rank)
        expected = files.get(path.name)
        actual = path.stat().st_size if path.is_file() else None
        if actual is None or actual != expected:
            state = "missing" if actual is None else f"{actual} bytes long instead of {expected}"
            raise CheckpointError(
                f"{folder} is half written or damaged: {path.name} is {state}; resume from "
                "another checkpoint"
            )
    return manifest
