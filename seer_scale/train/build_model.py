"""From a RunConfig to the model, its objective and its learning rate."""

from __future__ import annotations

import torch

from seer_scale import distributed
from seer_scale.config import RunConfig
from seer_scale.models import MultiCropModel, build_model
from seer_scale.objectives import Objective, build_objective
from seer_scale.optim.schedules import learning_rate, scaled_lr, warmup_start


def model_of(config: RunConfig, device: torch.device) -> MultiCropModel:
    """Builds the run's model without values."""
    model = config.model
    return build_model(
        model.trunk,
        head_dims=model.head_dims,
        head_batch_norm=model.head_batch_norm,
        prototypes=model.prototypes,
        device=device,
    )


def objective_of(config: RunConfig) -> Objective:
    """Builds the run's objective."""
    crops, options = sum(config.data.crop_counts), config.objective.options
    return build_objective(config.objective.name, crops=crops, options=options)


def learning_rate_of(config: RunConfig, step: int) -> float:
    """Returns the learning rate of `step`, counted from 0."""
    optim = config.optim
    peak = optim.lr or scaled_lr(optim.base_lr, config.train.global_batch)
    end = peak * optim.end_lr_ratio
    return learning_rate(
        step,
        total_steps=config.train.steps,
        warmup_steps=optim.warmup_steps,
        start=warmup_start(peak, nodes=distributed.nodes(), floor=end),
        peak=peak,
        end=end,
        schedule=optim.schedule,
    )
