"""Writes a trunk in another project's files, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from seer_scale.convert.files import FOLDER_FILES, HEAD
from seer_scale.convert.names import GROUPED_TRUNKS, Dialect, to_dialect, to_grouped
from seer_scale.convert.peers import huggingface_config, huggingface_preprocessor, timm_config
from seer_scale.convert.recognise import TrunkWeights
from seer_scale.convert.torch_file import write_torch_file
from seer_scale.errors import UserError
from seer_scale.serving import CONFIG, write_trunk
from seer_scale.storage.atomic import filled_folder, replaced_file
from seer_scale.storage.tensor_file import Kind, from_tensors, write_tensors

_CLASSIFIER = {"timm": "head.fc", "huggingface": "classifier.1", "torchvision": "fc"}


class Named:
    """Tensors under another project's names: each from the trunk or the classifier."""

    def __init__(self, source: TrunkWeights, dialect: Dialect, prefix: str = "") -> None:
        self.kinds: dict[str, Kind] = {}
        self._reads: dict[str, Callable[[], Tensor]] = {}
        for ours, kind in source.kinds.items():
            self._add(prefix + to_dialect(ours, dialect), kind, source.read, ours)
        if source.head.classes:
            for leaf in ("weight", "bias"):
                ours = f"classifier.{leaf}"
                if ours in source.head.kinds:
                    name = f"{_CLASSIFIER[dialect]}.{leaf}"
                    self._add(name, source.head.kinds[ours], source.head.read, ours)

    def _add(self, name: str, kind: Kind, read: Callable[[str], Tensor], ours: str) -> None:
        self.kinds[name] = kind
        self._reads[name] = lambda: read(ours)

    def read(self, name: str) -> Tensor:
        """Reads a tensor's values."""
        return self._reads[name]()


def write_timm(source: TrunkWeights, out: Path) -> None:
    """Writes a folder for `timm.create_model("local-dir:FOLDER", pretrained=True)`."""
    config = timm_config(source.trunk, source.head.classes, source.size)
    named = Named(source, "timm")
    with _folder(out, "model.safetensors") as fresh:
        write_tensors(fresh / "model.safetensors", named.kinds, named.read, {"format": "pt"})
        _write_json(fresh / CONFIG, config)


def write_huggingface(source: TrunkWeights, out: Path) -> None:
    """Writes a folder for `RegNetModel.from_pretrained`, with a classifier also for
    `RegNetForImageClassification`.
    """
    classes = source.head.classes
    named = Named(source, "huggingface", "regnet." if classes else "")
    dtype = str(source.kinds["stem.0.weight"].dtype).removeprefix("torch.")
    with _folder(out, "model.safetensors") as fresh:
        write_tensors(fresh / "model.safetensors", named.kinds, named.read, {"format": "pt"})
        _write_json(fresh / CONFIG, huggingface_config(source.trunk, classes, dtype))
        _write_json(fresh / "preprocessor_config.json", huggingface_preprocessor(source.size))


def write_torchvision(source: TrunkWeights, out: Path) -> None:
    """Writes a state dict: safetensors if `out` ends in `.safetensors`, else a torch file."""
    named = Named(source, "torchvision")
    with _file(out) as fresh:
        if out.suffix == ".safetensors":
            metadata = {"format": "pt", "trunk": source.trunk}
            write_tensors(fresh, named.kinds, named.read, metadata)
        else:
            write_torch_file(fresh, dict, named.kinds, named.read)


def write_own(source: TrunkWeights, out: Path) -> None:
    """Writes the folder that `seer_scale.load` reads, or one file `out` ending in `.safetensors`.

    A SwAV head or classifier goes to `head.safetensors` in the folder, or into the one file.
    """
    head = source.head
    if out.suffix == ".safetensors":
        kinds = {**source.kinds, **head.kinds}
        metadata = {"format": "pt", "trunk": source.trunk}

        def read(name: str) -> Tensor:
            return head.read(name) if name in head.kinds else source.read(name)

        with _file(out) as fresh:
            write_tensors(fresh, kinds, read, metadata)
        return
    # The head of an earlier export would be taken for this one's.
    without = () if head.kinds else (HEAD,)
    with _folder(out, "trunk.safetensors", without) as folder:
        write_trunk(
            folder,
            source.kinds,
            from_tensors(source.kinds, source.read),
            trunk=source.trunk,
            source=source.origin,
            source_names=source.dialect,
            **({"pretraining": dict(source.pretraining)} if source.pretraining else {}),
        )
        if head.kinds:
            write_tensors(folder / HEAD, head.kinds, head.read, {"format": "pt"})


def write_vissl(source: TrunkWeights, out: Path) -> None:
    """Writes a consolidated checkpoint for VISSL's `WEIGHTS_INIT`: trunk and heads.

    Trunks that exist in VISSL only in the FSDP form get the names of that form.
    """
    grouped, head = source.trunk in GROUPED_TRUNKS, source.head
    trunk_names = {
        ours: to_grouped(ours, source.trunk) if grouped else to_dialect(ours, "vissl")
        for ours in source.kinds
    }
    head_names = _vissl_head_names(source)
    kinds = {**source.kinds, **head.kinds}

    def nest(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        model = {
            "trunk": {theirs: tensors[ours] for ours, theirs in trunk_names.items()},
            "heads": {theirs: tensors[ours] for ours, theirs in head_names.items()},
        }
        meta: dict[str, Any] = {"trunk": {}, "heads": []}
        return {
            "type": "consolidated",
            "classy_state_dict": {"base_model": {"model": model, "meta": meta}},
        }

    def read(name: str) -> Tensor:
        return source.read(name) if name in source.kinds else head.read(name)

    with _file(out) as fresh:
        write_torch_file(fresh, nest, kinds, read)


def _vissl_head_names(source: TrunkWeights) -> dict[str, str]:
    names = {}
    for ours in source.head.swav:
        if ours == "prototypes.weight":
            names[ours] = "0.prototypes0.weight"
        else:
            names[ours] = f"0.projection_head.{ours.removeprefix('head.layers.')}"
    index = 1 if names else 0
    for ours in source.head.kinds.keys() - set(names):
        names[ours] = f"{index}.clf.0.{ours.removeprefix('classifier.')}"
    return names


@contextmanager
def _folder(out: Path, weights: str, without: Collection[str] = ()) -> Iterator[Path]:
    """Yields a new folder whose files move to `out` once all are written; see `filled_folder`."""
    if out.is_file():
        raise UserError(f"--out {out} is a file; this format is a folder")
    for other in FOLDER_FILES:
        if other != weights and (out / other).exists():
            raise UserError(f"--out {out} holds {other} already; give another folder")
    with filled_folder(out, last=weights, without=without) as fresh:
        yield fresh


@contextmanager
def _file(out: Path) -> Iterator[Path]:
    """Yields a new file that takes the place of `out` once it is written."""
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; this format is a file, e.g. {out / 'trunk.pth'}")
    with replaced_file(out) as fresh:
        yield fresh


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
