"""Training objectives on embeddings and scores, and the way to bring your own.

An objective is a class whose constructor takes `crops: int` and its own options, all as keyword
arguments with type annotations that exist at run time; those options are the keys `objective.*`
of a recipe. For a value out of range it raises a ValueError that begins with the option's name:
"epsilon is 0, but ...".

Its instances are called once per micro-batch, on every rank:

    loss, metrics = objective(embeddings, scores)

- embeddings [crops * B, D]: unit rows, crop-major (all images' first crop, then their second).
- scores [crops * B, K]: their dot products with the prototypes.
- loss: a scalar with a graph. Gradients are averaged over ranks, so it is a mean over this rank's
  samples. It has to depend on embeddings and scores both, if only by a term of weight zero.
- metrics: floats or detached scalars by name, logged as they are; no `.item()`, which would make
  the GPU wait. `collapse_warning` knows the names loss_over_ln_k, embedding_std and
  prototype_usage_entropy.

It may also have

- `queue`: a tensor [R, D] of further embeddings to be scored, or None. Their scores are then the
  last R rows of `scores`.
- `state_dict() -> dict[str, Tensor]` and `load_state_dict(state)`, per rank, for checkpoints; and
  `reshard(states, rank, world_size)`, which makes one rank's state out of those that another
  number of ranks saved. Without it, such a run goes on with a state as at the start.

An installed package offers an objective, as NAME for `objective.name`, by an entry point:

    [project.entry-points."seer_scale.objectives"]
    NAME = "package.module:Class"
"""

from seer_scale.objectives.build import OBJECTIVES, Objective, build_objective, check_options
from seer_scale.objectives.collapse import CollapseWatch, collapse_warning
from seer_scale.objectives.simclr import SimCLR
from seer_scale.objectives.sinkhorn import sinkhorn_knopp
from seer_scale.objectives.swav import SwAV

__all__ = [
    "OBJECTIVES",
    "CollapseWatch",
    "Objective",
    "SimCLR",
    "SwAV",
    "build_objective",
    "check_options",
    "collapse_warning",
    "sinkhorn_knopp",
]
