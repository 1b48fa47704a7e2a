"""The README beside exported weights: what they are, what images they expect, whose they are."""

from __future__ import annotations

from pathlib import Path

from seer_scale import __version__
from seer_scale.convert.peers import TORCHVISION
from seer_scale.convert.recognise import TrunkWeights
from seer_scale.models.regnet import trunk_config
from seer_scale.preprocessing import MEAN, STD

MARK = "<!-- written by seer_scale: a conversion may replace this file -->"

LICENCE = """\
The weights keep the licence of the source they were converted from. The SEER weights that Meta has
published (32 GF to 10B, pretrained and fine-tuned) come under a licence of their own, which allows
non-commercial use only: `projects/SEER/MODEL_LICENSE.md` of facebookresearch/vissl."""


def write_card(path: Path, source: TrunkWeights, to: str, product: str) -> Path:
    """Writes the model card of an export.

    Args:
        path: the card; where another export's is already, it goes to `PRODUCT.README.md`.
        source: what was converted.
        to: the format it was converted to.
        product: the exported file's or folder's name.
    """
    if path.is_file() and not path.read_text(errors="replace").startswith(_title(product)):
        path = path.with_name(f"{product}.README.md")
    path.write_text(card(source, to, product))
    return path


def card(source: TrunkWeights, to: str, product: str) -> str:
    """The card's text, in Markdown."""
    config = trunk_config(source.trunk)
    rows = [
        ("trunk", f"`{source.trunk}`, a RegNetY"),
        ("stages", "; ".join(f"{s.depth} x {s.width} in {s.groups} groups" for s in config.stages)),
        (
            "generator",
            f"depth {config.depth}, w_0 {config.w_0}, w_a {config.w_a}, w_m {config.w_m}, "
            f"group width {config.group_width}, SE ratio {config.se_ratio}",
        ),
        ("parameters of the trunk", f"{_parameters(source):,}"),
        ("features", f"{source.width}, the average-pooled last stage"),
        ("tensors", ", ".join(sorted({str(k.dtype)[6:] for k in source.kinds.values()}))),
        ("classifier", f"{source.head.classes} classes" if source.head.classes else "none"),
        ("format", to),
        ("source", f"`{source.origin}`, under {source.dialect}'s names"),
        ("made by", f"seer_scale {__version__}"),
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows)
    notes = "".join(f"- {note}\n" for note in source.notes)
    return f"""{_title(product)}
| | |
|---|---|
{table}

## Images

RGB, values in [0, 1], then per channel (x - mean) / std with mean {list(MEAN)} and std {list(STD)}.
SEER is pretrained on crops of 224 pixels (RG-10B: 160); any height and width from 32 on will do.

## Loading

{_loading(to, source, product)}

## Licence

{LICENCE}
{f"{chr(10)}## Notes{chr(10)}{chr(10)}{notes}" if notes else ""}"""


def _title(product: str) -> str:
    return f"{MARK}\n# {product}\n"


def _parameters(source: TrunkWeights) -> int:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return sum(kind.numel for name, kind in source.kinds.items() if not name.endswith(buffers))


def _loading(to: str, source: TrunkWeights, product: str) -> str:
    torchvision = TORCHVISION.get(source.trunk)
    lines = {
        "safetensors": f"import seer_scale\ntrunk = seer_scale.load({product!r})",
        "timm": f"import timm\nmodel = timm.create_model('local-dir:{product}', pretrained=True)",
        "huggingface": "from transformers import AutoModel\n"
        f"model = AutoModel.from_pretrained({product!r})",
        "torchvision": (
            f"import torch, torchvision\nmodel = torchvision.models.{torchvision}()\n"
            if torchvision
            else "# torchvision has no such network by name: see docs/convert.md, torchvision\n"
        )
        + f"model.load_state_dict(torch.load({product!r}), strict=False)  # no classifier: fc",
        "vissl": "# config.MODEL.WEIGHTS_INIT of VISSL:\n"
        f"# PARAMS_FILE: {product}, STATE_DICT_KEY_NAME: classy_state_dict",
        "onnx": f"import onnxruntime\nsession = onnxruntime.InferenceSession({product!r})\n"
        "features = session.run(None, {'images': images})[0]",
    }[to]
    return f"```python\n{lines}\n```"
