"""The options of the optimizer, as `parallel.engine.shard` takes them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OptimizerOptions:
    """Numbers of `SliceSGD`, and when and where its step runs.

    Attributes:
        momentum: share of the momentum that is kept from step to step, 0 <= momentum < 1.
        nesterov: use Nesterov's momentum, as `torch.optim.SGD` defines it.
        weight_decay: factor of the weights that is added to their gradient.
        trust_coefficient: LARC's trust coefficient; None turns LARC off.
        fuse_backward: step every tensor inside the backward pass, as soon as its gradient is
            complete, so that gradients take no memory.
        momentum_on_host: keep the momentum in pinned host memory.
    """

    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 0.0
    trust_coefficient: float | None = None
    fuse_backward: bool = False
    momentum_on_host: bool = False
