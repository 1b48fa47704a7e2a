"""Names of a trunk's tensors in VISSL, timm, Hugging Face and torchvision.

Our names are torchvision's. Tensors are matched by name alone, since implementations run their
modules in different orders (VISSL's shortcut comes first, Hugging Face's last).
"""

from __future__ import annotations

import re
from typing import Literal

Dialect = Literal["vissl", "timm", "huggingface", "torchvision"]
DIALECTS: tuple[Dialect, ...] = ("vissl", "timm", "huggingface", "torchvision")

# A stem's first convolution: no other tensor ends like it, so it tells a file's dialect, and what
# stands before it is the file's prefix.
STEM: dict[Dialect, str] = {
    "vissl": "_feature_blocks.conv1.stem.0.weight",
    "timm": "stem.conv.weight",
    "huggingface": "embedder.embedder.convolution.weight",
    "torchvision": "stem.0.weight",
}

_STEM_PARTS: dict[Dialect, tuple[str, str]] = {
    "vissl": ("_feature_blocks.conv1.stem.0", "_feature_blocks.conv1.stem.1"),
    "timm": ("stem.conv", "stem.bn"),
    "huggingface": ("embedder.embedder.convolution", "embedder.embedder.normalization"),
    "torchvision": ("stem.0", "stem.1"),
}
_BLOCK_PARTS: dict[str, dict[Dialect, str]] = {
    ours: {"vissl": vissl, "timm": timm, "huggingface": huggingface, "torchvision": ours}
    for ours, vissl, timm, huggingface in (
        ("f.a.0", "f.a.0", "conv1.conv", "layer.0.convolution"),
        ("f.a.1", "f.a.1", "conv1.bn", "layer.0.normalization"),
        ("f.b.0", "f.b.0", "conv2.conv", "layer.1.convolution"),
        ("f.b.1", "f.b.1", "conv2.bn", "layer.1.normalization"),
        ("f.se.fc1", "f.se.excitation.0", "se.fc1", "layer.2.attention.0"),
        ("f.se.fc2", "f.se.excitation.2", "se.fc2", "layer.2.attention.2"),
        ("f.c.0", "f.c", "conv3.conv", "layer.3.convolution"),
        ("f.c.1", "f.final_bn", "conv3.bn", "layer.3.normalization"),
        ("proj.0", "proj", "downsample.conv", "shortcut.convolution"),
        ("proj.1", "bn", "downsample.bn", "shortcut.normalization"),
    )
}
_BLOCK = re.compile(r"trunk_output\.block(\d+)\.block\d+-(\d+)\.(.+)\.(\w+)")

# VISSL's FSDP trunk keeps the blocks that are recomputed together in one group:
# RG-10B's third stage in two (`stage_checkpoints: [[2], [7], [9, 17], []]`), any other in one.
_SECOND_GROUP = {"rg_10b": {3: 9}}
GROUPED_TRUNKS = frozenset({"rg_10b"})  # VISSL has no other layout for them

_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_fpw_module)\.")
_GROUP = re.compile(r"\.block\d+-part\d+(?=\.)")


def to_dialect(name: str, dialect: Dialect) -> str:
    """Translates our name `name` to a dialect.

    Raises:
        ValueError: if `name` is none of a trunk's.
    """
    block = _BLOCK.fullmatch(name)
    if block is None:
        module, _, leaf = name.rpartition(".")
        if module not in _STEM_PARTS["torchvision"]:
            raise ValueError(f"{name} is not a tensor of a trunk")
        return f"{_STEM_PARTS[dialect][_STEM_PARTS['torchvision'].index(module)]}.{leaf}"
    stage, index, part, leaf = int(block[1]), int(block[2]), block[3], block[4]
    prefix = {
        "vissl": f"_feature_blocks.res{stage + 1}.block{stage}-{index}",
        "timm": f"s{stage}.b{index + 1}",
        "huggingface": f"encoder.stages.{stage - 1}.layers.{index}",
        "torchvision": f"trunk_output.block{stage}.block{stage}-{index}",
    }[dialect]
    return f"{prefix}.{_BLOCK_PARTS[part][dialect]}.{leaf}"


def to_grouped(name: str, trunk: str) -> str:
    """Translates our name `name` to VISSL's FSDP trunk (`regnet_fsdp`, `regnet_v2`)."""
    block = _BLOCK.fullmatch(name)
    plain = to_dialect(name, "vissl")
    if block is None:
        return plain
    stage = int(block[1])
    boundary = _SECOND_GROUP.get(trunk, {}).get(stage)
    group = int(boundary is not None and int(block[2]) >= boundary)
    head = f"_feature_blocks.res{stage + 1}."
    return f"{head}block{stage}-part{group}.{plain.removeprefix(head)}"


def without_wrappers(name: str) -> str:
    """Removes from a name the parts that FairScale's FSDP and VISSL's groups of blocks add."""
    return _GROUP.sub("", _WRAPPERS.sub("", name))
