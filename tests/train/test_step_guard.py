"""What the guard restores after a step that must not count.

Whole runs are tests/train/test_nonfinite.py and tests/train/test_spikes.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seer_scale.train.step_guard import StepGuard, Verdict


class Centred(nn.Module):
    """An objective whose state changes in place, as buffers of a module do."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, embeddings: Tensor, scores: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        self.centre += scores.mean(dim=0)
        return (scores - self.centre).square().mean(), {}


def test_a_state_that_changes_in_place_is_restored() -> None:
    objective, model = Centred(), nn.BatchNorm1d(3)
    guard = StepGuard(model, objective, mads=10.0, skip_spikes=False, micro_batches=2)
    expected = [[1.0, 2.0, 3.0], [1.0, 2.0, 3.0], [2.0, 4.0, 6.0]]
    for loss, centre in zip((1.0, math.nan, 1.0), expected, strict=True):
        guard.begin([])
        for _ in range(2):  # micro-batches
            objective(torch.zeros(4, 2), model(torch.zeros(4, 3)) + torch.tensor([0.5, 1.0, 1.5]))
        verdict = guard.judge(loss, loss, overflow=False)
        assert verdict is (Verdict.NONFINITE if math.isnan(loss) else Verdict.GOOD)
        assert objective.centre.tolist() == centre
    assert model.num_batches_tracked == 4  # of the two good steps
