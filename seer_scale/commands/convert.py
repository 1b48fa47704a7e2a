"""Converts weights: `seer-scale convert SOURCE --to FORMAT --out PATH`.

One tensor is in memory at a time (onnx excepted), so RG-10B needs no more than 4 GiB.
"""

from __future__ import annotations

import argparse

from seer_scale.config.argument_types import command_parser
from seer_scale.config.home_folder import expand_home, local_path

# Of seer_scale.convert, which takes torch to import.
FORMATS = ("safetensors", "vissl", "timm", "huggingface", "torchvision", "onnx")

EXAMPLES = """\
SOURCE is a run, a checkpoint, an exported trunk, models:/NAME@alias, hf:ORG/NAME, a folder for timm
or Hugging Face, or a file of weights (.torch, .pth, .pt, .bin, .safetensors) under VISSL's, timm's,
Hugging Face's, torchvision's or our names.

  seer-scale convert runs/demo --to timm --out exports/demo_timm
  seer-scale convert model_final_checkpoint_phase0.torch --to huggingface --out exports/seer
  seer-scale convert exports/seer --to onnx --out exports/seer.onnx
"""


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("source", type=expand_home, metavar="SOURCE")
    parser.add_argument(
        "--trunk",
        metavar="NAME",
        help="expected trunk, e.g. regnety_256gf; another one is an error",
    )
    parser.add_argument("--to", choices=FORMATS, required=True)
    parser.add_argument(
        "--out", type=local_path, required=True, metavar="PATH",
        help="a folder for timm and huggingface, a file for vissl, torchvision and onnx, either "
        "for safetensors",
    )  # fmt: skip
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns 0, or 1 after a message."""
    arguments = parser().parse_args(argv)
    from seer_scale.convert import convert  # torch is first imported here
    from seer_scale.convert.model_card import loading_code

    found = convert(arguments.source, arguments.to, arguments.out, trunk=arguments.trunk)
    tensors = f"{len(found.kinds)} tensors"
    if found.head.kinds:
        tensors += f", and {len(found.head.kinds)} of its heads"
    print(f"{found.origin} is {found.trunk} under {found.dialect}'s names: {tensors}")
    for note in found.notes:
        print(f"  {note}")
    print(f"wrote {arguments.out}; what loads it:")
    for line in loading_code(arguments.to, found.trunk, str(arguments.out)).splitlines():
        print(f"  {line}")
    return 0
