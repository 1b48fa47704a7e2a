"""What every network with a RegNet trunk offers to a sharding strategy: its stages and units."""

from __future__ import annotations

import itertools

from torch import nn

from seer_scale.models.regnet import RegNet


class OnTrunk(nn.Module):
    """A trunk with something on it: the trunk's blocks, and every other child as one more part."""

    def __init__(self, trunk: RegNet) -> None:
        super().__init__()
        self.trunk = trunk

    def stages(self) -> list[nn.Sequential]:
        """The trunk's stages, each a sequence of residual blocks."""
        return self.trunk.stages()

    def blocks(self) -> list[list[nn.Module]]:
        """The trunk's residual blocks, stage by stage."""
        return self.trunk.blocks()

    def units(self, heavy: int) -> list[nn.Module]:
        """What a sharding strategy gathers and frees as one, inner modules before outer ones.

        The blocks, whatever stands on the trunk, and single convolutions or linear layers of more
        than `heavy` parameters. What is left over (the stem) belongs to the model itself.
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
