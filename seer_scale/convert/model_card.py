"""Model card (README) of exported weights: contents, the run that made them, licence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
OWN_LICENCE = """\
Not stated: whoever trained these weights decides, and adds it here. The images that they were
trained on may have conditions too. seer_scale, which trained them, is under Apache-2.0."""


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
    """Text of the card, in Markdown."""
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
    licence = OWN_LICENCE if source.pretraining else LICENCE
    return f"""{_title(product)}
| | |
|---|---|
{table}
{_pretraining(source.pretraining)}
## Images

RGB, values in [0, 1], then per channel (x - mean) / std with mean {list(MEAN)} and std {list(STD)}.
{_sizes(source)}

## Loading

```python
{loading_code(to, source.trunk, product)}
```

## Licence

{licence}
{f"{chr(10)}## Notes{chr(10)}{chr(10)}{notes}" if notes else ""}"""


def _pretraining(made: Mapping[str, Any]) -> str:
    """Section about the run that made the trunk; empty if the source does not state one."""
    if not made:
        return ""
    sizes, counts = made.get("crop_sizes", []), made.get("crop_counts", [])
    crops = zip(counts, sizes, strict=True)
    knn = made.get("knn", {})
    data = f" on `{knn['data']}` at {knn['size']} pixels" if "data" in knn else ""
    rows = {
        "recipe": f"`{made['recipe']}`" if "recipe" in made else None,
        "objective": f"`{made['objective']}`" if "objective" in made else None,
        "steps": f"{made['steps']:,}" if "steps" in made else None,
        "images seen": f"{made['images']:,}" if "images" in made else None,
        "crops of an image": " and ".join(f"{n} x {size} pixels" for n, size in crops) or None,
        "k-NN top-1": f"{100 * knn['top1']:.2f} %{data}" if knn else "not measured",
    }
    table = "".join(f"| {key} | {value} |\n" for key, value in rows.items() if value)
    return f"\n## Pretraining, without labels\n\n| | |\n|---|---|\n{table}"


def _sizes(source: TrunkWeights) -> str:
    known = "crop_sizes" in source.pretraining
    trained = (
        f"The large crops of the training had {source.size} pixels"
        if known
        else "SEER is pretrained on crops of 224 pixels (RG-10B: 160)"
    )
    return f"{trained}; any height and width from 32 on will do."


def _title(product: str) -> str:
    return f"{MARK}\n# {product}\n"


def _parameters(source: TrunkWeights) -> int:
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return sum(kind.numel for name, kind in source.kinds.items() if not name.endswith(buffers))


def loading_code(to: str, trunk: str, product: str) -> str:
    """Returns the lines of Python that load an export.

    Args:
        to: format of the export.
        trunk: name of the trunk.
        product: path of the export, as the lines shall name it.
    """
    torchvision = TORCHVISION.get(trunk)
    return {
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
