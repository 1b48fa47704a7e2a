"""Heads on a trunk in a file: a SwAV head, a classifier, or one that no other format can hold.

A SwAV head keeps our names (`head.layers.*`, `prototypes.weight`), a classifier becomes
`classifier.weight` [K, C] and `classifier.bias` [K].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from seer_scale.convert.weights import Weights
from seer_scale.storage.tensor_file import Kind

_VISSL = re.compile(r"(?:.*\.)?heads\.(\d+)\.(.+)")
_OURS = re.compile(r"(?:.*\.)?(head\.layers\.\d+\.\w+|prototypes\.weight)")
# timm, torchvision, Hugging Face, and ours.
_CLASSIFIER = re.compile(r"(?:.*\.)?(?:head\.fc|fc|classifier\.1|classifier)\.(weight|bias)")
_PROJECTION = re.compile(r"projection_head\.(\d+\.\w+)")
_BN_EPS = 1e-5  # of VISSL's heads


@dataclass(frozen=True)
class Head:
    """Tensors beside the trunk, under our names.

    Attributes:
        kinds: dtype and shape of every tensor.
        read: a tensor's values on the CPU.
        notes: one line for each head that no format has a place for.
    """

    kinds: Mapping[str, Kind]
    read: Callable[[str], Tensor]
    notes: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes of the classifier; 0 without a classifier."""
        weight = self.kinds.get("classifier.weight")
        return weight.shape[0] if weight else 0

    @property
    def swav(self) -> list[str]:
        """Our names of the SwAV head's tensors."""
        return [name for name in self.kinds if not name.startswith("classifier.")]


def find_head(names: Mapping[str, str], weights: Weights, width: int) -> tuple[Head, list[str]]:
    """Sorts the tensors of a source that do not belong to its trunk.

    Args:
        names: plain name -> the source's name.
        weights: the source.
        width: number of the trunk's features; a classifier of other features cannot be carried.

    Returns:
        The heads, and the names that belong to none.
    """
    found: dict[str, tuple[Kind, Callable[[], Tensor]]] = {}
    heads: dict[int, dict[str, str]] = {}
    notes, left_over = [], []
    for name, full in names.items():
        if match := _VISSL.fullmatch(name):
            heads.setdefault(int(match[1]), {})[match[2]] = full
        elif match := _OURS.fullmatch(name):
            found[match[1]] = _direct(weights, full)
        elif match := _CLASSIFIER.fullmatch(name):
            found[f"classifier.{match[1]}"] = _direct(weights, full)
        else:
            left_over.append(name)
    for index, head in sorted(heads.items()):
        carried = _vissl_head(head, weights, width)
        if carried is None or carried.keys() & found.keys():
            notes.append(f"dropped heads.{index} ({len(head)} tensors): {_why(head, carried)}")
        else:
            found.update(carried)
            if dropped := len(head) - sum(1 for name in head if _kept(name)):
                notes.append(
                    f"dropped {dropped} tensors of heads.{index}: prototypes but the first"
                )
    kinds = {name: kind for name, (kind, _) in found.items()}
    return Head(kinds, lambda name: found[name][1](), tuple(notes)), left_over


def _direct(weights: Weights, full: str) -> tuple[Kind, Callable[[], Tensor]]:
    return weights.kinds[full], lambda: weights.read(full)


def _kept(name: str) -> bool:
    return not (name.startswith("prototypes") and name != "prototypes0.weight")


def _vissl_head(
    head: Mapping[str, str], weights: Weights, width: int
) -> dict[str, tuple[Kind, Callable[[], Tensor]]] | None:
    """Translates one head to our names; None for a head without a counterpart here."""
    if "prototypes0.weight" in head or any(map(_PROJECTION.fullmatch, head)):
        carried = {}
        for name, full in head.items():
            if match := _PROJECTION.fullmatch(name):
                carried[f"head.layers.{match[1]}"] = _direct(weights, full)
            elif name == "prototypes0.weight":
                carried["prototypes.weight"] = _direct(weights, full)
            elif not re.fullmatch(r"prototypes\d+\.weight", name):
                return None
        return carried
    if head.keys() == {"clf.0.weight", "clf.0.bias"}:
        weight = _direct(weights, head["clf.0.weight"])
        if weight[0].shape[1] != width:
            return None
        return {
            "classifier.weight": weight,
            "classifier.bias": _direct(weights, head["clf.0.bias"]),
        }
    return _folded(head, weights, width)


def _folded(
    head: Mapping[str, str], weights: Weights, width: int
) -> dict[str, tuple[Kind, Callable[[], Tensor]]] | None:
    """Folds VISSL's eval_mlp (BatchNorm, then Linear) into one Linear, equal in eval mode."""
    linear = {"clf.clf.0.weight", "clf.clf.0.bias"}
    norm = {f"channel_bn.{leaf}" for leaf in ("running_mean", "running_var")}
    affine = {f"channel_bn.{leaf}" for leaf in ("weight", "bias")}
    optional = affine | {"channel_bn.num_batches_tracked"}
    if not (linear | norm <= head.keys() <= linear | norm | optional):
        return None
    kind = weights.kinds[head["clf.clf.0.weight"]]
    # Linears on larger maps, or on other stages, have other widths.
    if kind.shape[1] != width or weights.kinds[head["channel_bn.running_mean"]].shape != (width,):
        return None

    def value(name: str) -> Tensor:
        return weights.read(head[name]).double()

    def scale() -> Tensor:
        unit = (value("channel_bn.running_var") + _BN_EPS).rsqrt()
        return unit * value("channel_bn.weight") if affine <= head.keys() else unit

    def fold_weight() -> Tensor:
        return (value("clf.clf.0.weight") * scale()).to(kind.dtype)

    def fold_bias() -> Tensor:
        shift = -value("channel_bn.running_mean") * scale()
        if affine <= head.keys():
            shift += value("channel_bn.bias")
        return (value("clf.clf.0.bias") + value("clf.clf.0.weight") @ shift).to(kind.dtype)

    return {
        "classifier.weight": (kind, fold_weight),
        "classifier.bias": (Kind(kind.dtype, kind.shape[:1]), fold_bias),
    }


def _why(head: Mapping[str, str], carried: Mapping[str, object] | None) -> str:
    if carried is not None:
        return "the first of its kind is carried"
    if any(name.startswith(("clf.", "channel_bn.")) for name in head):
        return "it does not classify the pooled features with one linear layer"
    return "no other format has its like"
