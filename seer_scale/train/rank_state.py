"""The state that each rank has beside its slices: random generators and the objective's queue.

A step itself draws no random numbers, since data are keyed by sample; an installed objective may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from seer_scale.objectives import Objective

_OBJECTIVE = "objective."


def seed_rank(seed: int, rank: int) -> None:
    """Seeds torch's random generators, differently on every rank."""
    torch.manual_seed((seed << 20) + rank)


def rank_state(objective: Objective, device: torch.device) -> dict[str, Tensor]:
    """Collects this rank's own tensors for a checkpoint."""
    state = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    if hasattr(objective, "state_dict"):
        own: Mapping[str, Tensor] = objective.state_dict()
        state |= {f"{_OBJECTIVE}{key}": value for key, value in own.items()}
    return state


def load_rank_state(
    state: Mapping[str, Tensor], objective: Objective, device: torch.device
) -> None:
    """Restores the result of `rank_state` of this rank, on the number of ranks that saved it."""
    torch.set_rng_state(state["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)
    if hasattr(objective, "load_state_dict"):
        objective.load_state_dict(_own(state, device))


def reshard_state(
    states: Sequence[Mapping[str, Tensor]],
    objective: Objective,
    device: torch.device,
    rank: int,
    world_size: int,
) -> bool:
    """Restores the objective's state on another number of ranks than saved it.

    Random generators stay as `seed_rank` left them. An objective without `reshard` starts with an
    empty state.

    Args:
        states: saved tensors of every rank, in rank order.
        objective: objective whose state is restored.
        device: device of this rank.
        rank: this rank.
        world_size: number of ranks now.

    Returns:
        False if the objective had a state that could not be restored.
    """
    if not hasattr(objective, "load_state_dict"):
        return True
    own = [_own(state, device) for state in states]
    if not hasattr(objective, "reshard"):
        return not any(own)
    objective.load_state_dict(objective.reshard(own, rank, world_size))
    return True


def _own(state: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Returns the tensors of the objective, without the prefix of their names."""
    return {
        key.removeprefix(_OBJECTIVE): value.to(device)
        for key, value in state.items()
        if key.startswith(_OBJECTIVE)
    }
