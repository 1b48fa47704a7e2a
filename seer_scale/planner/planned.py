"""A plan: a configuration on hardware with all that it takes, and the same as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seer_scale.config import RunConfig
from seer_scale.errors import ConfigError
from seer_scale.performance.flops import Flops
from seer_scale.performance.hardware import Hardware
from seer_scale.performance.shape import Shape
from seer_scale.planner.memory import GIB, Memory
from seer_scale.planner.step_time import StepTime


@dataclass(frozen=True)
class Plan:
    """A configuration on hardware, and what it takes.

    Attributes:
        config: the resolved configuration.
        arguments: of `seer-scale pretrain` that give it.
        hardware: of a rank.
        hardware_name: of its profile.
        strategy: of `STRATEGIES`.
        nodes: machines.
        gpus_per_node: ranks of each.
        images: of the whole run.
        shape: parameters.
        recomputed: positions of the blocks whose activations are.
        flops: per image.
        memory: bytes per rank.
        bytes_per_step: that a rank sends, by kind.
        time: of a step.
    """

    config: RunConfig
    arguments: tuple[str, ...]
    hardware: Hardware
    hardware_name: str
    strategy: str
    nodes: int
    gpus_per_node: int
    images: float
    shape: Shape
    recomputed: frozenset[int]
    flops: Flops
    memory: Memory
    bytes_per_step: dict[str, float]
    time: StepTime

    @property
    def world(self) -> int:
        """Ranks."""
        return self.nodes * self.gpus_per_node

    @property
    def global_batch(self) -> int:
        """Images of a step."""
        train = self.config.train
        return train.micro_batch_size * train.gradient_accumulation * self.world

    @property
    def fits(self) -> bool:
        """Whether a rank has the memory."""
        return self.missing_gib <= 0

    @property
    def missing_gib(self) -> float:
        """GiB that a rank has too few; negative where there is room."""
        return self.memory.total / GIB - self.hardware.usable_gib

    @property
    def images_per_second(self) -> float:
        """Of all ranks together."""
        return self.global_batch / self.time.total

    @property
    def mfu(self) -> float:
        """Share of all peaks that the model's own operations use; recomputation is no use."""
        peak = self.hardware.peak(self.config.train.precision) * self.world
        return self.images_per_second * self.flops.training / peak

    @property
    def days(self) -> float:
        """For all images."""
        return self.images / self.images_per_second / 86_400

    @property
    def command(self) -> str:
        """That starts the run."""
        return f"{_launcher(self)} launch/pretrain.py {' '.join(self.arguments)}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "recipe": self.config.recipe,
            "hardware": self.hardware_name,
            "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node,
            "strategy": self.strategy,
            "activation_checkpointing": self.config.sharding.activation_checkpointing,
            "micro_batch_size": self.config.train.micro_batch_size,
            "sync_bn_group_size": self.config.sharding.sync_bn_group_size,
            "precision": self.config.train.precision,
            "global_batch": self.global_batch,
            "parameters": {
                "trunk": self.shape.trunk,
                "head": self.shape.head,
                "prototypes": self.shape.prototypes,
                "total": self.shape.total,
            },
            "flops_per_image": self.flops.training,
            "flops": {
                "forward_per_crop_by_size": {
                    str(size): count for size, count in self.flops.by_size.items()
                },
                "forward": self.flops.forward,
                "recompute": self.flops.recompute,
                "training_with_recompute": self.flops.training + self.flops.recompute,
                "by_torch_flop_counter": self.flops.torch_counter,
            },
            "memory_gib_per_rank": self.memory.gib(),
            "memory_gib_available": self.hardware.usable_gib,
            "fits": self.fits,
            "bytes_per_step": {
                **self.bytes_per_step,
                "total": sum(self.bytes_per_step.values()),
            },
            "step_seconds": self.time.total,
            "step_seconds_by_term": asdict(self.time),
            "images_per_second": self.images_per_second,
            "mfu": self.mfu,
            "images": self.images,
            "days": self.days,
            "gpu_hours": self.days * 24 * self.world,
            "command": self.command,
        }


def _launcher(plan: Plan) -> str:
    many = plan.nodes > 1
    if plan.strategy.startswith("zero"):
        where = f"--hostfile hostfile --num_nodes {plan.nodes} " if many else ""
        return f"deepspeed {where}--num_gpus {plan.gpus_per_node}"
    where = " --rdzv_backend c10d --rdzv_endpoint HOST:29500" if many else ""
    return f"torchrun --nnodes {plan.nodes} --nproc_per_node {plan.gpus_per_node}{where}"


def write_json(content: dict[str, Any], path: Path) -> None:
    """One file, readable.

    Raises:
        ConfigError: if it cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
