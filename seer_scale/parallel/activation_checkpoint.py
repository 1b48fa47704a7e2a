"""Activation checkpointing of RegNet blocks: keep the input of a block and recompute the rest.

Chen et al. (arXiv 1604.06174), by torch's non-reentrant `checkpoint`, so that a region may run
several times per step (once per crop resolution). Recomputation is exact for BatchNorm: see
`batch_statistics.checkpoint_contexts`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from seer_scale.parallel.batch_statistics import checkpoint_contexts


def apply_activation_checkpointing(
    stages: Sequence[nn.Sequential],
    mode: str,
    groups: Sequence[Sequence[int]] | None = None,
    recomputed: Collection[int] = (),
) -> None:
    """Makes blocks recompute their activations in the backward pass, in place.

    Args:
        stages: the trunk's stages, each a sequence of blocks (`model.stages()`).
        mode: `none`; `full`, every block on its own; `groups`, consecutive blocks as one region;
            `auto:GIB`, the blocks of `recomputed`, each on its own.
        groups: for `groups`, the end of each group (one past its last block), per stage, as in
            SEER's RG-10B: [[2], [7], [9, 17], []] makes two groups of stage 3, blocks 0-8 and
            9-16. Blocks after the last end form one more group. A stage with an empty list is not
            recomputed. An end beyond the stage means the end of the stage.
        recomputed: for `auto`, positions counted through all stages (`RecomputePlan.recomputed`).

    Raises:
        ValueError: if mode `groups` has not one list per stage.
    """
    if mode == "none":
        return
    if mode == "full" or mode.startswith("auto"):
        for index, block in enumerate(itertools.chain(*stages)):
            if mode == "full" or index in recomputed:
                _recompute_alone(block)
        return
    if groups is None or len(groups) != len(stages):
        raise ValueError(
            f"expected one list of block indices per stage ({len(stages)}), got {groups}"
        )
    for stage, ends in zip(stages, groups, strict=True):
        if ends:
            _recompute_in_groups(stage, ends)


def _recompute_alone(block: nn.Module) -> None:
    # The forward is replaced on the instance, so that no parameter name gets a prefix.
    block.forward = partial(
        checkpoint, block.forward, use_reentrant=False, context_fn=checkpoint_contexts
    )


def _recompute_in_groups(stage: nn.Sequential, ends: Sequence[int]) -> None:
    bounds = sorted({min(end, len(stage)) for end in ends} | {len(stage)})

    def forward(x: Any) -> Any:
        # Looked up at every call: a strategy may have put hooks or wrappers on the blocks since.
        blocks = list(stage.children())
        for first, bound in itertools.pairwise([0, *bounds]):
            x = checkpoint(
                _run, blocks[first:bound], x, use_reentrant=False, context_fn=checkpoint_contexts
            )
        return x

    stage.forward = forward  # type: ignore[method-assign]


def _run(blocks: Sequence[nn.Module], x: Any) -> Any:
    for block in blocks:
        x = block(x)
    return x
