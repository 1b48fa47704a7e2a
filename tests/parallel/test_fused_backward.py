"""Steps inside the backward pass refuse gradients that come too late, or not at all.

That they are the same steps is tests/parallel/test_parity.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seer_scale.optim.groups import parameter_groups
from seer_scale.optim.slice_sgd import SliceSGD, apply_schedule
from seer_scale.parallel.fused_backward import FusedBackward


def fused(model: nn.Module, *, learn: bool) -> FusedBackward:
    optimizer = SliceSGD(
        parameter_groups(model, unit_rows=frozenset()),
        momentum=0.0,
        weight_decay=0.0,
        trust_coefficient=None,
    )
    apply_schedule(optimizer.param_groups, lr=0.5)
    return FusedBackward(optimizer, [[parameter] for parameter in model.parameters()], learn=learn)


@pytest.mark.parametrize("learn", [False, True])
def test_a_gradient_that_comes_late_or_not_at_all_is_an_error(learn: bool) -> None:
    model = nn.ParameterList([torch.ones(2), torch.ones(2)])
    one, other = model
    step = fused(model, learn=learn)
    for _ in range(2):  # with `learn` the first step counts the parts
        (one.sum() + other.sum()).backward()
        step.finish()
    assert one.tolist() == other.tolist() == [0.0, 0.0]  # two steps of 0.5 along a gradient of 1
    one.sum().backward()
    with pytest.raises(RuntimeError, match="left gradients out"):
        step.finish()
    with pytest.raises(RuntimeError, match="arrived after its tensor had stepped"):
        one.sum().backward()
