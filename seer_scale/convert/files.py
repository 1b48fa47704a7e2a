"""Opens the named tensors of a file or folder of any supported origin."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seer_scale.convert.pickles import Pickle, Stored, is_pickle, read_pickle
from seer_scale.convert.vissl_files import is_vissl, vissl_weights
from seer_scale.convert.weights import Weights, joined
from seer_scale.errors import CheckpointError, UserError
from seer_scale.serving import CONFIG, WEIGHTS
from seer_scale.storage.tensor_file import TensorFile
from seer_scale.tracking.records import read_knn

# The first that is there counts; safetensors before pickles.
FOLDER_FILES = (
    WEIGHTS,
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
HEAD = "head.safetensors"
_STEP = re.compile(r"step_(\d{8})")  # a checkpoint's folder
_NESTED = ("state_dict", "model_state_dict", "model", "module")


def open_weights(path: Path) -> Weights:
    """Opens the tensors of a weights file, or of a folder that holds one.

    Args:
        path: safetensors, a file of `torch.save`, or a folder of a trunk, timm or Hugging Face,
            whose weights may be split over several files.

    Raises:
        UserError: if nothing is there.
        CheckpointError: if it is damaged, cut off, no weights, or a pickle that asks for code.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a file of weights or a folder that holds one")
    if path.suffix == ".json" and path.name.endswith(".index.json"):
        return _open_index(path)
    if path.suffix != ".safetensors" and is_pickle(path):
        return _from_pickle(read_pickle(path))
    return _open_safetensors(path)


def _open_folder(folder: Path) -> Weights:
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            break
    else:
        raise CheckpointError(
            f"{folder} holds no weights: none of {', '.join(FOLDER_FILES)} is there"
        )
    weights = open_weights(folder / name)
    if name == WEIGHTS:
        parts = [weights]
        if (folder / HEAD).is_file():
            parts.append(_open_safetensors(folder / HEAD))
        config = _config(folder)
        both = joined(str(folder), parts)
        made = {**config.get("pretraining", {}), **_knn_of(folder)}
        trunk = weights.trunk or config.get("trunk")
        return Weights(both.origin, both.kinds, both.read, trunk, both.notes, made)
    return weights


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _knn_of(folder: Path) -> dict[str, Any]:
    """The k-NN result of a checkpoint's trunk, from the run around it."""
    checkpoint = folder.resolve().parent
    step = _STEP.fullmatch(checkpoint.name)
    found = read_knn(checkpoint.parents[1], int(step[1])) if step else None
    return {"knn": found} if found else {}


def _open_safetensors(path: Path) -> Weights:
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path} is an ONNX file, which is an export only: give the run, the checkpoint or the "
            "weights that it was made of"
        )
    try:
        file = TensorFile(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged, cut off or no file of weights ({error}); copy or download it again"
        ) from None
    kinds = {name: entry.kind for name, entry in file.entries.items()}
    return Weights(str(path), kinds, file.whole, file.metadata.get("trunk"))


def _open_index(path: Path) -> Weights:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not an index of weights ({error})") from None
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise CheckpointError(f"{path} lists {missing[0]}, which is not there; copy it too")
    return joined(str(path), [open_weights(path.parent / name) for name in names])


def _from_pickle(pickle: Pickle) -> Weights:
    if is_vissl(pickle.content):
        return vissl_weights(pickle)
    tensors = _state(pickle.content)
    if tensors is None:
        raise CheckpointError(
            f"{pickle.path} holds no state dict: neither tensors by name nor any of "
            f"{', '.join(('classy_state_dict', *_NESTED))}"
        )
    kinds = {name: stored.kind for name, stored in tensors.items()}
    return Weights(str(pickle.path), kinds, lambda name: tensors[name].whole(), None, pickle.notes)


def _state(content: Any) -> dict[str, Stored] | None:
    if not isinstance(content, Mapping):
        return None
    tensors = {str(k): value for k, value in content.items() if isinstance(value, Stored)}
    if tensors:
        return tensors
    for key in _NESTED:
        if (found := _state(content.get(key))) is not None:
            return found
    return None
