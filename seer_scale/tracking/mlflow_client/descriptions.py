"""Texts of registered models and their versions: what was trained, on how much, how good it is.

A text that a person has written stays: only texts that begin as ours are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

KNN_TAG = "eval_knn_top1"
_VERSION = "Trunk `"
_MODEL = "Trunks of seer_scale"
_KNN = re.compile(r"no k-NN yet|k-NN top-1 [\d.]+ %")


def is_ours(text: str | None) -> bool:
    """Tells whether a text is empty or was written here."""
    return not text or text.startswith((_VERSION, _MODEL))


def of_version(config: Mapping[str, Any], tags: Mapping[str, str]) -> str:
    """Text of a version, in Markdown.

    Args:
        config: the trunk's config.json.
        tags: tags of the version; the k-NN accuracy, if it is known, is among them.
    """
    made: Mapping[str, Any] = config.get("pretraining", {})
    text = f"{_VERSION}{config['trunk']}`, features of {config['width']} values"
    if "recipe" in made:
        text += f", recipe `{made['recipe']}`"
    if "objective" in made:
        text += f", objective `{made['objective']}`"
    text += f", step {tags['step']}"
    if "images" in made:
        text += f", {made['images']:,} images seen"
    if "crop_sizes" in made:
        crops = zip(made["crop_counts"], made["crop_sizes"], strict=True)
        text += ", crops of " + " and ".join(f"{count} x {size}" for count, size in crops)
        text += " pixels"
    top1 = tags.get(KNN_TAG) or made.get("knn", {}).get("top1")
    knn = f"k-NN top-1 {100 * float(top1):.2f} %" if top1 else "no k-NN yet"
    source = f"\n\nConverted from `{config['source']}`." if "source" in config else ""
    return f"{text}; {knn}.{source}"


def with_knn(text: str, top1: float) -> str:
    """The same text with the result of a later evaluation."""
    return _KNN.sub(f"k-NN top-1 {100 * top1:.2f} %", text)


def of_model(newest: str, text: str) -> str:
    """Text of a registered model, in Markdown.

    Args:
        newest: number of its newest version.
        text: description of this version.
    """
    return (
        f"{_MODEL}: RegNets pretrained without labels. Load one with "
        "`seer_scale.load` or `mlflow.pyfunc.load_model`.\n\n"
        f"Version {newest}: {text}"
    )
