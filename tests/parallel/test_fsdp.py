"""What a rank holds whole between the forward and the backward pass, as sharding asks for.

That fsdp and hsdp train like a plain loop is tests/parallel/test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor

from harness.parity import Case, build_engine, configuration, my_crops
from harness.pool import Distributed

CPU = torch.device("cpu")


def whole_shares(reshard: bool) -> list[float]:
    """Share of the weights that is whole after the forward pass, and after the backward pass."""
    case = Case("fsdp", sharding={"reshard_after_forward": reshard})
    engine = build_engine(case, configuration(case), CPU)
    sizes = {name: parameter.numel() for name, parameter in engine.model.named_parameters()}
    _, scores = engine(my_crops(0, CPU), None)
    shares = []
    for backward in (False, True):
        if backward:
            engine.backward(scores.square().mean())
        held = dict(engine.model.named_parameters())
        whole = sum(sizes[name] for name, p in held.items() if not isinstance(p, DTensor))
        shares.append(whole / sum(sizes.values()))
    return shares


@pytest.mark.parametrize("reshard", [True, False])
def test_units_stay_whole_until_their_backward_pass_only_if_asked(
    distributed: Distributed, reshard: bool
) -> None:
    for between, after in distributed(whole_shares, 2, reshard):
        assert between == (0.0 if reshard else 1.0)
        assert after == 0.0
