"""Weights in and out: VISSL, timm, Hugging Face, torchvision, safetensors; ONNX out."""

from seer_scale.convert.conversion import FORMATS, Format, convert, open_trunk
from seer_scale.convert.rebuild import rebuild
from seer_scale.convert.recognise import TrunkWeights

__all__ = ["FORMATS", "Format", "TrunkWeights", "convert", "open_trunk", "rebuild"]
