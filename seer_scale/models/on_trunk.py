"""Stages, blocks and units that every network on a RegNet trunk offers to a sharding strategy."""

from __future__ import annotations

import itertools

from torch import nn

from seer_scale.models.regnet import RegNet


class OnTrunk(nn.Module):
    """A network on a trunk; each child beside the trunk is one more part."""

    def __init__(self, trunk: RegNet) -> None:
        super().__init__()
        self.trunk = trunk

    def stages(self) -> list[nn.Sequential]:
        """The trunk's stages, each a sequence of residual blocks."""
        return self.trunk.stages()

    def blocks(self) -> list[list[nn.Module]]:
        """The trunk's residual blocks, stage by stage."""
        return self.trunk.blocks()

    def float32_parts(self) -> list[nn.Module]:
        """The children whose forward pass stays in float32 under every precision."""
        return []

    def low_precision_layers(self) -> list[nn.Module]:
        """The convolutions and linear layers that run in 16 bit under a precision of 16 bit."""
        wide = {module for part in self.float32_parts() for module in part.modules()}
        layers = (m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear))
        return [layer for layer in layers if layer not in wide]

    def units(self, heavy: int) -> list[nn.Module]:
        """Lists the modules that are gathered and freed as one, inner modules before outer ones.

        The units are the blocks, the parts on top of the trunk, and single convolutions or linear
        layers of more than `heavy` parameters. The rest (the stem) belongs to the model itself.
        """
        on_top = [child for child in self.children() if child is not self.trunk]
        units: list[nn.Module] = []
        for part in [*itertools.chain(*self.blocks()), *on_top]:
            for layer in part.modules():
                own = sum(parameter.numel() for parameter in layer.parameters(recurse=False))
                if layer is not part and own > heavy:
                    units.append(layer)
            units.append(part)
        return units
