"""A trunk as two files that anybody can load: `trunk.safetensors` and `config.json`.

The same folder is what a checkpoint holds in `trunk/`, what a registered MLflow model carries as
its data, and what `seer_scale.load` reads. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import platform
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
from seer_scale.storage.atomic import replaced_folder
from seer_scale.storage.tensor_file import (
    Fill,
    Kind,
    Stamp,
    from_tensors,
    stamp,
    stream_tensors,
)

WEIGHTS = "trunk.safetensors"
CONFIG = "config.json"
FORMAT = 1
USUAL_SIZE = 224  # pixels; the side of the large crops that SEER is pretrained on
_SERVED = "__pyfunc_model_path__"  # variable that MLflow sets in the processes of a model's server


def export_trunk(
    model_or_state: nn.Module | Mapping[str, Tensor],
    folder: Path | str,
    *,
    trunk: str,
    **metadata: Any,
) -> Path:
    """Writes a trunk's tensors and its configuration; a killed export leaves no half.

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
    kinds = {name: Kind.of(tensor) for name, tensor in state.items()}
    with replaced_folder(folder) as fresh:
        write_trunk(
            fresh,
            kinds,
            from_tensors(kinds, lambda name: state[name].detach().cpu().contiguous()),
            trunk=trunk,
            **metadata,
        )
    return folder


def write_trunk(
    folder: Path,
    kinds: Mapping[str, Kind],
    fill: Fill,
    *,
    trunk: str,
    **metadata: Any,
) -> dict[str, Stamp]:
    """Writes the two files of `export_trunk` into a folder, one tensor in memory at a time.

    The caller puts the folder on the disk and in its place, as `storage.atomic` does.

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
        raise CheckpointError(f"{folder} is not an exported trunk: it has no {CONFIG}") from None
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
        raise CheckpointError(f"{folder} is not an exported trunk: it has no {WEIGHTS}")
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
    """Model behind `mlflow.pyfunc.load_model`: images in, features out, as NumPy arrays.

    Args:
        trunk: the trunk.
        size: side in pixels of the crop of encoded images, see `crop_size`.
    """

    def __init__(self, trunk: nn.Module, size: int = USUAL_SIZE) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trunk = trunk.to(self.device).eval()
        self.size = size

    def predict(self, images: Any, params: dict[str, Any] | None = None) -> NDArray[np.float32]:
        """Features of one batch.

        Args:
            images: float32 [B, 3, H, W], normalised with `mean` and `std` of config.json; a numpy
                array, a torch tensor or nested lists. Or encoded images, whose middle is cut:
                bytes of JPEGs, paths, or base64; a numpy array of them or a list. A server of
                MLflow takes no paths: whoever can reach it would read its disk. One forward pass:
                the batch must fit.
            params: part of MLflow's interface; there are none.

        Returns:
            Float32 [B, C].

        Raises:
            DataError: if the shape or type is another, or an image cannot be used.
        """
        batch = self._batch(images)
        with torch.inference_mode():
            features: NDArray[np.float32] = self.trunk(batch).float().cpu().numpy()
        return features

    def _batch(self, images: Any) -> Tensor:
        if items := _encoded(images):
            # Decoders are needed by callers with encoded images only.
            from seer_scale.data.encoded_images import middle_crops

            crops = middle_crops(items, self.size, paths=_SERVED not in os.environ)
            return crops.to(self.device)
        try:
            given = np.asarray(images)
            if given.dtype.kind in "biu":
                raise DataError(
                    f"images are {given.dtype}, but must be float32, normalised with mean and std "
                    "of config.json; or give the encoded files"
                )
            batch = torch.as_tensor(given.astype(np.float32, copy=False), device=self.device)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"images are neither an array of numbers nor encoded images ({error})"
            ) from None
        if batch.ndim != 4 or batch.shape[1] != 3:
            raise DataError(
                f"images have shape {tuple(batch.shape)}; [batch, 3, height, width] is needed"
            )
        return batch


def _encoded(images: Any) -> list[Any]:
    """Lists the encoded images that a caller gives; empty if they are numbers."""
    kinds = (bytes, str, os.PathLike)
    if isinstance(images, np.ndarray) and images.ndim < 2 and images.dtype.kind in "OSU":
        images = np.atleast_1d(images).tolist()
    items = [images] if isinstance(images, kinds) else images
    return (
        list(items)
        if isinstance(items, list) and isinstance(next(iter(items), None), kinds)
        else []
    )


def crop_size(config: Mapping[str, Any]) -> int:
    """Side in pixels of the large crops that a trunk was trained on; 224 if nobody wrote it down.

    Args:
        config: content of config.json.
    """
    sizes: list[int] = config.get("pretraining", {}).get("crop_sizes", [USUAL_SIZE])
    return max(sizes)


def _load_pyfunc(data_path: str) -> FeatureExtractor:
    """MLflow's entry point of a `loader_module`."""
    return FeatureExtractor(load_trunk(data_path), crop_size(read_config(data_path)))


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
