"""Signs of collapse, the usual failure of self-supervised training, and a warning.

A collapsed trunk gives every image the same embedding; the loss then stays at chance level.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from seer_scale.distributed import all_reduce

NEAR_GUESSING = 1e-3  # relative distance of the loss from ln K
SMALL_STD = 0.01  # cosine of two images above 0.9999
SMALL_USAGE = 0.1  # 16000 prototypes used like 3
WINDOW = 50  # steps that a verdict is averaged over
SETTLING_STEPS = 100  # after warm-up and freezing every run still looks collapsed

REMEDIES = (
    "a smaller epsilon (0.03), a lower learning rate, prototypes frozen for more steps, "
    "a larger batch or a queue"
)


@torch.no_grad()
def embedding_std(embeddings: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Spread of unit embeddings [N, D]: about 1 for all directions, 0 if all rows are equal.

    The spread is sqrt(D) times the standard deviation over the rows of all ranks, averaged over
    the D dimensions. One all-reduce.
    """
    wide = embeddings.double()  # the variance of a collapse is a difference of near equals
    count = wide.new_full((1,), wide.shape[0])
    sums = all_reduce(torch.cat([wide.sum(dim=0), wide.square().sum(dim=0), count]), "sum", group)
    dim = wide.shape[1]
    mean, mean_square = sums[:dim] / sums[-1], sums[dim:-1] / sums[-1]  # [D]
    std = (mean_square - mean.square()).clamp(min=0).sqrt()
    return (std.mean() * math.sqrt(dim)).float()


@torch.no_grad()
def usage_entropy(codes: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """Entropy of the mean of codes [N, K] over all ranks, divided by ln K.

    1 if all prototypes are used equally, 0 if one takes everything. One all-reduce.
    """
    sums = all_reduce(codes.sum(dim=0), "sum", group)  # [K]
    entropy: Tensor = torch.special.entr(sums / sums.sum()).sum()
    return entropy / math.log(codes.shape[1])


def collapse_warning(metrics: Mapping[str, float]) -> str | None:
    """Returns a sentence if the metrics are those of a collapsed run, else None.

    Untrained trunks look much the same, and frozen prototypes keep the loss near ln K, so ask
    with metrics averaged over recent steps, well after the prototypes were released.

    Args:
        metrics: what objectives return; of `loss_over_ln_k`, `embedding_std` and
            `prototype_usage_entropy` those that are there are judged.
    """
    nan = math.nan  # compares as false
    loss = metrics.get("loss_over_ln_k", nan)
    std = metrics.get("embedding_std", nan)
    usage = metrics.get("prototype_usage_entropy", nan)
    signs = []
    if abs(loss - 1) < NEAR_GUESSING:
        signs.append(f"the loss is that of guessing (loss_over_ln_k {loss:.4f})")
    if std < SMALL_STD:
        signs.append(f"all images get nearly the same embedding (embedding_std {std:.4f})")
    if usage < SMALL_USAGE:
        signs.append(
            f"the codes use hardly any of the prototypes (prototype_usage_entropy {usage:.4f})"
        )
    if not signs:
        return None
    return f"The run looks collapsed: {' and '.join(signs)}; what usually helps is {REMEDIES}."


class CollapseWatch:
    """Asks `collapse_warning` every `WINDOW` steps, once a run has settled.

    Args:
        from_step: when warm-up is over and the prototypes move.
    """

    def __init__(self, from_step: int) -> None:
        self._settled = from_step + SETTLING_STEPS
        self._recent: deque[Mapping[str, float]] = deque(maxlen=WINDOW)

    def observe(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Takes in the metrics of a step; returns a sentence if the run looks collapsed."""
        self._recent.append(metrics)
        if step < self._settled or step % WINDOW:
            return None
        sums = {key: sum(m.get(key, 0) for m in self._recent) for key in metrics}
        return collapse_warning({key: total / len(self._recent) for key, total in sums.items()})
