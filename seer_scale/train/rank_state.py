"""What every rank has of its own, beside its slices: random generators, the objective's queue.

A step itself draws no random numbers (data are keyed by sample); an installed objective may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from seer_scale.objectives import Objective

_OBJECTIVE = "objective."


def seed_rank(seed: int, rank: int) -> None:
    """Seeds torch's generators, differently on every rank."""
    torch.manual_seed((seed << 20) + rank)


def rank_state(objective: Objective, device: torch.device) -> dict[str, Tensor]:
    """This rank's own tensors, for a checkpoint."""
    state = {"rng.cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["rng.cuda"] = torch.cuda.get_rng_state(device)
    if hasattr(objective, "state_dict"):
        own: Mapping[str, Tensor] = objective.state_dict()
        state |= {f"{_OBJECTIVE}{key}": value for key, value in own.items()}
    return state


def load_rank_state(
    states: Sequence[Mapping[str, Tensor]],
    objective: Objective,
    device: torch.device,
    *,
    rank: int,
    world_size: int,
) -> bool:
    """Puts `rank_state` back, also on another number of ranks; whether all of it could be.

    Args:
        states: of every rank that saved, in rank order.
        objective: whose state it is.
        device: of this rank.
        rank: this one.
        world_size: ranks there are now. Where it differs from then, generators stay as
            `seed_rank` left them, and an objective that cannot `reshard` starts afresh.
    """
    same = len(states) == world_size
    if same:
        torch.set_rng_state(states[rank]["rng.cpu"])
        if device.type == "cuda" and "rng.cuda" in states[rank]:
            torch.cuda.set_rng_state(states[rank]["rng.cuda"], device)
    own = [
        {
            key.removeprefix(_OBJECTIVE): value.to(device)
            for key, value in state.items()
            if key.startswith(_OBJECTIVE)
        }
        for state in states
    ]
    if not hasattr(objective, "load_state_dict"):
        return True
    if same:
        objective.load_state_dict(own[rank])
    elif hasattr(objective, "reshard"):
        objective.load_state_dict(objective.reshard(own, rank, world_size))
    else:
        return not any(own)
    return True
