"""Putting a checkpoint back: progress before the engine exists, everything else afterwards."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

from seer_scale import distributed
from seer_scale.checkpoint import CheckpointReader
from seer_scale.objectives import Objective
from seer_scale.parallel.engine import Engine
from seer_scale.train.rank_state import load_rank_state, reshard_state
from seer_scale.train.state import TrainState


def read_state(
    reader: CheckpointReader | None, build_model: Callable[[torch.device], nn.Module]
) -> TrainState:
    """Reads the progress of the run that `reader` holds; no progress without a reader.

    Args:
        reader: checkpoint to resume from, or None.
        build_model: builds the run's model on the device it is given (here: meta).

    Raises:
        CheckpointError: if the checkpoint is of another model, or its state is damaged.
    """
    if reader is None:
        return TrainState()
    reader.check(build_model(torch.device("meta")))
    return TrainState.of(reader.manifest, reader.folder)


def restore(
    reader: CheckpointReader, engine: Engine, objective: Objective, device: torch.device, name: str
) -> None:
    """Restores momentum, loss scale, random generators and the objective's state.

    Weights and buffers are not restored here: the engine is built with them.

    Args:
        reader: checkpoint to resume from.
        engine: engine whose momentum and loss scale are restored.
        objective: objective whose state is restored.
        device: device of this rank.
        name: name of the objective, for a warning.
    """
    reader.fill_momentum(engine.slices(), together=engine.holds_all)
    saved_scale = reader.manifest.get("loss_scale")
    if engine.loss_scale and saved_scale:  # a run may resume in another precision
        engine.loss_scale.load(saved_scale)
    saved_ranks, world_size = reader.manifest["world_size"], distributed.world_size()
    if saved_ranks == world_size:
        load_rank_state(reader.local_state(), objective, device)
        whole = True
    else:
        whole = reshard_state(
            reader.local_states(), objective, device, distributed.rank(), world_size
        )
    reader.close()
    if not whole and distributed.is_main():
        print(
            f"objective.name={name} cannot take over its state from "
            f"{saved_ranks} ranks to {world_size}: its state starts empty",
            file=sys.stderr,
        )
