"""Rebuilds a torch module from recognised tensors."""

from __future__ import annotations

from seer_scale.convert.recognise import TrunkWeights
from seer_scale.models.regnet import RegNet, build_trunk


def rebuild(source: TrunkWeights) -> RegNet:
    """Builds the trunk in eval mode on the CPU: images [B, 3, H, W] -> features [B, width].

    Raises:
        CheckpointError: if a file is cut off.
    """
    module = build_trunk(source.trunk, device="meta")
    module.load_state_dict({name: source.read(name) for name in source.kinds}, assign=True)
    return module.eval()
