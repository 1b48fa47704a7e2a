"""What every rank has of its own, beside its slices: random generators, the objective's queue.

A step itself draws no random numbers (data are keyed by sample); an installed objective may.
"""

from __future__ import annotations

from collections.abc import Mapping

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
    state: Mapping[str, Tensor], objective: Objective, device: torch.device
) -> None:
    """Puts `rank_state` back."""
    torch.set_rng_state(state["rng.cpu"])
    if device.type == "cuda" and "rng.cuda" in state:
        torch.cuda.set_rng_state(state["rng.cuda"], device)
    if hasattr(objective, "load_state_dict"):
        objective.load_state_dict(
            {
                key.removeprefix(_OBJECTIVE): value.to(device)
                for key, value in state.items()
                if key.startswith(_OBJECTIVE)
            }
        )
