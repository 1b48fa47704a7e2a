"""A conversion takes the memory of one tensor, whatever the size of the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from seer_scale.convert.names import to_dialect, to_grouped
from seer_scale.models import build_trunk
from seer_scale.storage.tensor_file import Kind, lay_out
from tests.convert.vissl_layouts import content

ROOT = Path(__file__).resolve().parents[2]
MIB, GIB = 2**20, 2**30
# Not ru_maxrss, which a process takes over from the one that starts it.
MEASURE = """
import sys
from harness.resident import resident_bytes
from seer_scale.commands.convert import main
main(sys.argv[1:])
print("peak", resident_bytes("VmHWM"))
"""


def kinds(trunk: str) -> dict[str, Kind]:
    state = build_trunk(trunk, device="meta").state_dict()
    return {name: Kind.of(tensor) for name, tensor in state.items()}


def size(trunk: str) -> int:
    return sum(kind.bytes for kind in kinds(trunk).values())


def largest(trunk: str) -> int:
    return max(kind.bytes for kind in kinds(trunk).values())


def sparse_safetensors(trunk: str, path: Path) -> None:
    """Zeros that take no room on the disk."""
    layout = lay_out(kinds(trunk), {"trunk": trunk})
    with path.open("wb") as file:
        file.write(layout.header)
        file.truncate(layout.bytes)


def sparse_vissl(trunk: str, path: Path) -> None:
    """As `torch.save` lays it out, its tensors' bytes left out."""
    grouped, shapes = trunk == "rg_10b", kinds(trunk)
    with torch._subclasses.FakeTensorMode():
        state: Mapping[str, Tensor] = {
            to_grouped(name, trunk) if grouped else to_dialect(name, "vissl"): torch.empty(
                kind.shape, dtype=kind.dtype
            )
            for name, kind in shapes.items()
        }
    with torch.serialization.skip_data(materialize_fake_tensors=True):
        torch.save(content(state, {}), path)


def peak(source: Path, to: str, out: Path) -> int:
    """Peak resident bytes of a conversion in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(source), "--to", to, "--out", str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split("peak ")[1])


WAYS: list[tuple[str, Callable[[str, Path], None], str]] = [
    ("source.safetensors", sparse_safetensors, "timm"),
    ("source.safetensors", sparse_safetensors, "vissl"),
    ("source.torch", sparse_vissl, "huggingface"),
]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "write", "to"), WAYS)
def test_memory_does_not_grow_with_the_model(
    name: str, write: Callable[[str, Path], None], to: str, tmp_path: Path
) -> None:
    """5 GB of weights against 11 MB: the difference is that of their largest tensors."""
    peaks = {}
    for trunk in ("regnety_200mf", "regnety_256gf"):
        if shutil.disk_usage(tmp_path).free < size(trunk) + GIB:
            pytest.skip(f"{trunk} needs {size(trunk) / GIB:.0f} GiB of free disk")
        write(trunk, tmp_path / name)
        peaks[trunk] = peak(tmp_path / name, to, tmp_path / "out")
        written = tmp_path / "out"
        bytes_written = sum(f.stat().st_size for f in written.iterdir()) if written.is_dir() else (
            written.stat().st_size
        )  # fmt: skip
        assert bytes_written >= size(trunk)
        shutil.rmtree(written) if written.is_dir() else written.unlink()
    print(json.dumps({to: {trunk: f"{bytes / MIB:.0f} MiB" for trunk, bytes in peaks.items()}}))
    # torch and torchvision take most of it: two thirds of a GiB with their CUDA libraries.
    assert peaks["regnety_256gf"] < 1.25 * GIB
    grown = peaks["regnety_256gf"] - peaks["regnety_200mf"]
    assert grown < largest("regnety_256gf") + 64 * MIB < size("regnety_256gf") / 8


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_rg10b_converts_in_four_gib(tmp_path: Path) -> None:
    """The source is sparse; what is written is not."""
    needed, free = size("rg_10b") + GIB, shutil.disk_usage(tmp_path).free
    if free < needed:
        pytest.skip(f"RG-10B needs {needed / GIB:.0f} GiB of free disk; {free / GIB:.0f} are free")
    sparse_vissl("rg_10b", tmp_path / "conso.torch")
    found = peak(tmp_path / "conso.torch", "huggingface", tmp_path / "out")
    print(f"rg_10b: {found / GIB:.2f} GiB")
    assert found < 4 * GIB
