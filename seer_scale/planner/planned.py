"""A plan: memory, traffic, time and cost of a configuration on hardware, also as JSON."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seer_scale.errors import ConfigError
from seer_scale.performance.flops import Flops
from seer_scale.performance.hardware import Hardware
from seer_scale.performance.shape import Shape
from seer_scale.planner.job import Batch, Layout
from seer_scale.planner.memory import GIB, Memory
from seer_scale.planner.model import Model
from seer_scale.planner.step_time import StepTime


@dataclass(frozen=True)
class Plan:
    """A configuration on hardware, with its memory, traffic and time.

    Attributes:
        recipe: name of the recipe.
        arguments: arguments of `seer-scale pretrain` that give the configuration.
        hardware: profile of every rank's device.
        hardware_name: name of the profile.
        layout: ranks and sharding.
        batch: images of a rank in a step.
        model: trunk, head and prototypes.
        activation_checkpointing: value of `sharding.activation_checkpointing`.
        checkpoint_groups: value of `sharding.checkpoint_groups`.
        images: images of the whole run.
        steps: optimizer steps of the whole run.
        shape: parameters of the model.
        recomputed: positions of the recomputed blocks.
        flops: operations per image.
        memory: bytes per rank.
        bytes_per_step: bytes that a rank sends in a step, by kind.
        time: seconds of a step.
        notes: what the number of ranks cannot keep of the recipe, one line each.
    """

    recipe: str
    arguments: tuple[str, ...]
    hardware: Hardware
    hardware_name: str
    layout: Layout
    batch: Batch
    model: Model
    activation_checkpointing: str
    checkpoint_groups: tuple[tuple[int, ...], ...] | None
    images: int
    steps: int
    shape: Shape
    recomputed: frozenset[int]
    flops: Flops
    memory: Memory
    bytes_per_step: dict[str, float]
    time: StepTime
    notes: tuple[str, ...]

    @property
    def strategy(self) -> str:
        """Name of the strategy in `planner.plan.STRATEGIES`."""
        return self.layout.name

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.layout.world

    @property
    def global_batch(self) -> int:
        """Images of all ranks in a step."""
        return self.batch.images * self.world

    @property
    def fits(self) -> bool:
        """Whether the memory of a rank is enough."""
        return self.missing_gib <= 0

    @property
    def missing_gib(self) -> float:
        """GiB that a rank lacks; negative if there is room."""
        return self.memory.total / GIB - self.hardware.usable_gib

    @property
    def images_per_second(self) -> float:
        """Images per second of all ranks together."""
        return self.global_batch / self.time.total

    @property
    def mfu(self) -> float:
        """Model FLOPs utilisation, a share of 1 (PaLM, arXiv 2204.02311, appendix B).

        Operations of the forward and backward pass per second over the peak of all ranks;
        recomputation does not count.
        """
        peak = self.hardware.peak(self.batch.precision) * self.world
        return self.images_per_second * self.flops.training / peak

    @property
    def days(self) -> float:
        """Days of training for all images of the run."""
        return self.images / self.images_per_second / 86_400

    @property
    def gpu_hours(self) -> float:
        """Hours of all ranks together."""
        return self.days * 24 * self.world

    @property
    def command(self) -> str:
        """Shell command that starts the run."""
        return f"{_launcher(self)} launch/pretrain.py {shlex.join(self.arguments)}"

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON object, as `seer-scale plan --json` writes it."""
        return {
            "recipe": self.recipe,
            "hardware": self.hardware_name,
            "nodes": self.layout.nodes,
            "gpus_per_node": self.layout.gpus_per_node,
            "strategy": self.strategy,
            "activation_checkpointing": self.activation_checkpointing,
            "micro_batch_size": self.batch.micro_batch_size,
            "sync_bn_group_size": self.layout.sync_bn_group_size,
            "precision": self.batch.precision,
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
            "gpu_hours": self.gpu_hours,
            "command": self.command,
            "gradient_accumulation": self.batch.gradient_accumulation,
            "steps": self.steps,
            "notes": list(self.notes),
        }


def _launcher(plan: Plan) -> str:
    nodes, per_node = plan.layout.nodes, plan.layout.gpus_per_node
    many = nodes > 1
    if plan.strategy.startswith("zero"):
        where = f"--hostfile hostfile --num_nodes {nodes} " if many else ""
        return f"deepspeed {where}--num_gpus {per_node}"
    where = " --rdzv_backend c10d --rdzv_endpoint HOST:29500" if many else ""
    return f"torchrun --nnodes {nodes} --nproc_per_node {per_node}{where}"


def write_json(content: dict[str, Any], path: Path) -> None:
    """Writes a JSON file that people can read.

    Raises:
        ConfigError: if the file cannot be written.
    """
    try:
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
