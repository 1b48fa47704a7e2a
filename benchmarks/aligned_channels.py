"""Counts the parameters and operations that `model.align_channels` adds to every trunk.

    python benchmarks/aligned_channels.py [--write]

Nothing is timed: parameters are those of modules on the meta device, operations follow from shapes.
`--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from torch import nn

from benchmarks import record
from seer_scale.models import TRUNKS, align_channels, build_trunk
from seer_scale.performance.flops import trunk_layers

COMMAND = "python benchmarks/aligned_channels.py --write"
DOCUMENT = record.ROOT / "docs" / "performance.md"
MULTIPLE, SIZE = 8, 224


def row(name: str, multiple: int) -> list[str]:
    """Makes a trunk's row: padded widths, and the added parameters and operations in per cent."""
    config = TRUNKS[name]
    plain, aligned = build_trunk(name, device="meta"), build_trunk(name, device="meta")
    align_channels(aligned, multiple)
    layers = trunk_layers(config, SIZE)
    # Multiplications of a convolution: number of weights times pixels of the output.
    growth = [
        new / old for old, new in zip(kernel_sizes(plain), kernel_sizes(aligned), strict=True)
    ]
    flops = sum(layer.forward for layer in layers)
    more = sum(layer.forward * times for layer, times in zip(layers, growth, strict=True))
    group = config.stages[-1].group_width
    held = -(-group // multiple) * multiple
    parameters, with_padding = (
        sum(tensor.numel() for tensor in trunk.parameters()) for trunk in (plain, aligned)
    )
    return [
        f"`{name}`",
        f"{group} -> {held}" if held > group else f"{group}",
        ", ".join(str(stage.width) for stage in config.stages),
        ", ".join(str(stage.groups * held) for stage in config.stages) if held > group else "as is",
        f"+{100 * (with_padding / parameters - 1):.2f} %",
        f"+{100 * (more / flops - 1):.2f} %",
    ]


def kernel_sizes(trunk: nn.Module) -> list[int]:
    """Lists the number of weights of every convolution."""
    return [module.weight.numel() for module in trunk.modules() if isinstance(module, nn.Conv2d)]


def table(multiple: int = MULTIPLE) -> str:
    """Writes the Markdown table of all trunks."""
    header = ["trunk", "group width", "widths", "with padding", "parameters", "FLOPs"]
    return record.markdown(header, [row(name, multiple) for name in TRUNKS])


def main() -> None:
    """Prints the table; `--write` puts the table for a multiple of 8 into the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--multiple", type=int, default=MULTIPLE, help="channels are padded to a multiple of this"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOCUMENT.name}")
    arguments = parser.parse_args()
    print(table(arguments.multiple), end="")
    if arguments.write:
        record.put_into(DOCUMENT, "aligned channels", table())


if __name__ == "__main__":
    main()
