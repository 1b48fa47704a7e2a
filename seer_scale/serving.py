"""A trunk as two files that anybody can load: `trunk.safetensors` and `config.json`.

The same folder is what a checkpoint holds in `trunk/`, what a registered MLflow model carries as
its data, and what `seer_scale.load` reads. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from seer_scale import __version__
from seer_scale.errors import CheckpointError, DataError
from seer_scale.models import build_trunk
from seer_scale.preprocessing import MEAN, STD
from seer_scale.storage.tensor_file import (
    Fill,
    Kind,
    Stamp,
    from_tensors,
    stamp,
    stream_tensors,
    sync,
)

WEIGHTS = "trunk.safetensors"
CONFIG = "config.json"
FORMAT = 1


def export_trunk(
    model_or_state: nn.Module | Mapping[str, Tensor],
    folder: Path | str,
    *,
    trunk: str,
    **metadata: Any,
) -> Path:
    """Writes a trunk's tensors and what is needed to rebuild it; a killed export leaves no half.

    Args:
        model_or_state: a trunk, or its state_dict, whole tensors on any device.
        folder: where the two files go; what it held before is replaced.
        trunk: key of `TRUNKS`.
        metadata: JSON values for config.json, e.g. `step=200, loss=3.1`.

    Raises:
        CheckpointError: if the tensors are not those of `trunk`.
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    folder = Path(folder)
    fresh = folder.with_name(f"{folder.name}.writing")
    shutil.rmtree(fresh, ignore_errors=True)
    kinds = {name: Kind.of(tensor) for name, tensor in state.items()}
    write_trunk(
        fresh,
        kinds,
        from_tensors(kinds, lambda name: state[name].detach().cpu().contiguous()),
        trunk=trunk,
        **metadata,
    )
    if folder.exists():
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
        os.replace(fresh, folder)
        shutil.rmtree(old)
    else:
        os.replace(fresh, folder)
    return folder


def write_trunk(
    folder: Path,
    kinds: Mapping[str, Kind],
    fill: Fill,
    *,
    trunk: str,
    **metadata: Any,
) -> dict[str, Stamp]:
    """The two files of `export_trunk`, into a folder, one tensor in memory at a time.

    Args:
        folder: made here unless it is there.
        kinds: dtype and shape of every tensor.
        fill: the source of their bytes.
        trunk: key of `TRUNKS`.
        metadata: JSON values for config.json.

    Returns:
        The files' lengths and checksums by name.

    Raises:
        CheckpointError: if the tensors are not those of `trunk`.
        OSError: if the disk is full or does not write.
    """
    width, shapes = _expected(trunk)
    found = {name: kind.shape for name, kind in kinds.items()}
    _check_shapes(found, shapes, trunk, "the model to export")
    config = {
        "format": FORMAT,
        "trunk": trunk,
        "width": width,
        "mean": MEAN,
        "std": STD,
        **metadata,
        "versions": versions(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    named = {"format": "pt", "seer_scale_format": str(FORMAT), "trunk": trunk}
    weights = stream_tensors(folder / WEIGHTS, kinds, fill, named)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    sync(folder / CONFIG)
    sync(folder)
    return {WEIGHTS: weights, CONFIG: stamp(folder / CONFIG)}


def read_config(folder: Path | str) -> dict[str, Any]:
    """The `config.json` of an exported trunk.

    Raises:
        CheckpointError: if it is missing, damaged or of a later format.
    """
    path = Path(folder) / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        form = int(config["format"])
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no exported trunk: it has no {CONFIG}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); export the trunk again") from None
    if form > FORMAT:
        raise CheckpointError(
            f"{path} has format {form}, seer_scale {__version__} reads up to {FORMAT}: update it"
        )
    return config


def load_trunk(folder: Path | str) -> nn.Module:
    """Rebuilds an exported trunk on the CPU, in eval mode: images [B, 3, H, W] -> features [B, C].

    Raises:
        CheckpointError: if a file is missing or damaged, or the tensors are another model's.
    """
    trunk = str(read_config(folder)["trunk"])
    path = Path(folder) / WEIGHTS
    if not path.is_file():
        raise CheckpointError(f"{folder} is no exported trunk: it has no {WEIGHTS}")
    try:
        # A copy: tensors in the file are not aligned as torch aligns its own, so kernels would
        # take other paths and features differ in the last bit from those of the trained trunk.
        state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); export the trunk again") from None
    module = build_trunk(trunk, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check_shapes(shapes, _expected(trunk)[1], trunk, str(path))
    module.load_state_dict(state, assign=True)
    return module.eval()


class FeatureExtractor:
    """What `mlflow.pyfunc.load_model` wraps: images in, features out, as numpy arrays."""

    def __init__(self, trunk: nn.Module) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trunk = trunk.to(self.device).eval()

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Features of one batch.

        Args:
            images: float32 [B, 3, H, W], normalised with `mean` and `std` of config.json; a numpy
                array, a torch tensor or nested lists. One forward pass: the batch must fit.
            params: part of MLflow's interface; there are none.

        Returns:
            Float32 [B, C].

        Raises:
            DataError: if the shape is another.
        """
        batch = torch.as_tensor(np.asarray(images, dtype=np.float32), device=self.device)
        if batch.ndim != 4 or batch.shape[1] != 3:
            raise DataError(
                f"images have shape {tuple(batch.shape)}; [batch, 3, height, width] is needed"
            )
        with torch.inference_mode():
            features: NDArray[np.float32] = self.trunk(batch).float().cpu().numpy()
        return features


def _load_pyfunc(data_path: str) -> FeatureExtractor:
    """MLflow's entry point of a `loader_module`."""
    return FeatureExtractor(load_trunk(data_path))


@cache
def _expected(trunk: str) -> tuple[int, dict[str, tuple[int, ...]]]:
    """Width of a trunk and shapes of its tensors; kept, since building it holds up the training."""
    module = build_trunk(trunk, device="meta")
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    return module.width, shapes


def _check_shapes(
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    trunk: str,
    source: str,
) -> None:
    differences = [
        *(f"missing {name}" for name in expected.keys() - found.keys()),
        *(f"unexpected {name}" for name in found.keys() - expected.keys()),
        *(
            f"{name} is {list(found[name])} instead of {list(shape)}"
            for name, shape in expected.items()
            if found.get(name, shape) != shape
        ),
    ]
    if differences:
        first = "; ".join(sorted(differences)[:3])
        raise CheckpointError(
            f"the tensors of {source} are not those of {trunk}: {len(differences)} of "
            f"{len(expected)} differ ({first})"
        )


def versions() -> dict[str, str]:
    """Python, this package and those that a checkpoint depends on."""
    found = {"python": platform.python_version(), "seer_scale": __version__}
    for package in ("torch", "torchvision", "safetensors", "numpy"):
        try:
            # Local build labels such as +cu126 exist on no package index.
            found[package] = version(package).split("+")[0]
        except PackageNotFoundError:
            continue
    return found
