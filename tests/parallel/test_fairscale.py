"""FairScale's engine on two CPU ranks: the same steps as ddp, bit for bit.

FairScale is written for GPUs. On a CPU its streams are replaced by one that never waits, and its
reduce-scatter is given vectors. All else is FairScale's own: units, gathering, the reduction of
gradients, recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from harness.parity import (
    CROPS,
    GPU_CASES,
    LR,
    Result,
    build_engine,
    configuration,
    my_crops,
    train,
    whole_tensors,
)
from harness.pool import Distributed
from seer_scale import distributed as ranks_of_run
from seer_scale.objectives.swav import SwAV
from seer_scale.optim.slice_sgd import apply_schedule
from tests.train.runs import FACTORS, Factor

STEPS = 12  # prototypes are frozen in the first five


class Stream:
    """The only stream of a CPU: whoever waits for it need not wait."""

    def wait_stream(self, stream: Stream) -> None: ...

    def synchronize(self) -> None: ...


@contextmanager
def one_stream() -> Iterator[None]:
    """Replaces what FairScale asks of CUDA, in this process and as long as the context lasts."""
    only = Stream()
    reduce_scatter: Any = dist._reduce_scatter_base  # type: ignore[attr-defined]

    def flattened(output: Tensor, summed: Tensor, group: Any) -> None:
        reduce_scatter(output.view(-1), summed.view(-1), group=group)  # gloo takes vectors only

    def answers(value: object) -> Any:
        return lambda *_: value

    with pytest.MonkeyPatch.context() as patch:
        for name in ("Stream", "current_stream"):
            patch.setattr(torch.cuda, name, answers(only))
        patch.setattr(torch.cuda, "stream", answers(nullcontext()))
        patch.setattr(torch.cuda, "is_available", answers(True))  # else it makes no streams
        patch.setattr(torch.cuda, "synchronize", answers(None))
        patch.setattr(Tensor, "record_stream", answers(None))
        patch.setattr(dist, "_reduce_scatter_base", flattened)
        yield


def fairscale(checkpointing: str) -> Result:
    with one_stream():
        return train("fairscale", checkpointing, STEPS)


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_steps_are_those_of_ddp(distributed: Distributed, checkpointing: str) -> None:
    pytest.importorskip("fairscale")
    ranks = distributed(fairscale, 2, checkpointing)
    plain = distributed(train, 2, "ddp", "none", STEPS)[0]
    for rank in ranks:
        assert rank.losses == plain.losses
        assert rank.norms == plain.norms
        assert rank.tensors.keys() == plain.tensors.keys()
        for name, value in plain.tensors.items():
            assert torch.equal(rank.tensors[name], value), name


def disturbed(checkpointing: str) -> list[tuple[float, bool, bool]]:
    """Steps whose loss or gradient rank 1 disturbs; of each the norm, and which state moved.

    The state is parameters, and momenta. The last step is undisturbed.
    """
    with one_stream():
        config = configuration(GPU_CASES["fairscale"], checkpointing)
        engine = build_engine(GPU_CASES["fairscale"], config, torch.device("cpu"))
        parameters = [name for name, _ in engine.model.named_parameters()]
        swav = SwAV(crops=sum(CROPS))
        found = []
        for step, (on_loss, on_gradient) in enumerate([*FACTORS.values(), (1.0, 1.0)]):
            if ranks_of_run.rank() == 0:
                on_loss, on_gradient = 1.0, 1.0
            before = [whole_tensors(engine, kind) for kind in ("values", "momentum")]
            apply_schedule(engine.param_groups, lr=LR)
            embeddings, scores = engine(my_crops(step, torch.device("cpu")), None)
            loss, _ = swav(embeddings, Factor.apply(scores, on_gradient))
            engine.backward(loss * on_loss)
            norm = engine.step()
            assert norm is not None
            after = [whole_tensors(engine, kind) for kind in ("values", "momentum")]
            values, momenta = (
                any(not torch.equal(old[name], new[name]) for name in parameters)
                for old, new in zip(before, after, strict=True)
            )
            found.append((float(norm), values, momenta))
    return found


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_nan_losses_and_nan_or_infinite_gradients_move_nothing(
    distributed: Distributed, checkpointing: str
) -> None:
    pytest.importorskip("fairscale")
    for steps in distributed(disturbed, 2, checkpointing):
        assert [(math.isfinite(norm), *moved) for norm, *moved in steps] == [
            *[(False, False, False)] * len(FACTORS),
            (True, True, True),
        ]
