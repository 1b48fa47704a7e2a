"""The sections of `make bench` besides the step: codes and loss, BatchNorm, strategies and others.

LARC, start-up and the trainer's overhead are measured here too. `benchmarks/bench.py` runs these
functions and keeps their results.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from benchmarks import record
from benchmarks.memory import fresh
from benchmarks.train_step import arguments, in_turns
from harness.engines import RECIPE, STRATEGIES, build_engine, configuration, forward_and_backward
from seer_scale.config.recipe import parse
from seer_scale.models import build_model, initialise
from seer_scale.objectives import SwAV
from seer_scale.optim.groups import parameter_groups
from seer_scale.optim.slice_sgd import SliceSGD
from seer_scale.parallel.batchnorm import GroupedSyncBatchNorm
from seer_scale.planner import plan

Row = dict[str, Any]
PROTOTYPES, IMAGES = 16_000, 16  # SEER's prototypes; images per rank
RANKS = (2, 8, 64, 512)
LARC_TRUNK = "regnety_16gf"
# Floats that pass through memory per parameter: the norms read value and gradient; the update reads
# value, gradient and momentum, and writes value and momentum.
LARC_TRAFFIC = 4 * (2 + 3 + 2)


def loss(repeats: int) -> list[Row]:
    """Measures codes, loss and gradient at K = 16,000 beside the planned step of seer_256gf.

    Computing does not depend on the number of ranks: it is measured here, beside the arithmetic
    that the planner counts for this machine. Communication does: it is planned for H200, beside the
    arithmetic there.
    """
    objective = SwAV(crops=6)
    scores = torch.randn(6 * IMAGES, PROTOTYPES).mul_(0.3).requires_grad_()
    embeddings = nn.functional.normalize(torch.randn(6 * IMAGES, 256), dim=1)

    def run() -> None:
        value, _ = objective(embeddings, scores)
        value.backward()  # type: ignore[no-untyped-call]

    (computing,) = in_turns([run], repeats)
    rows = []
    for ranks in RANKS:
        options = (f"train.micro_batch_size={IMAGES}", "sharding.sync_bn_group_size=0")
        here = plan("seer_256gf", "cpu", nodes=1, gpus_per_node=2, overrides=options)
        there = plan(
            "seer_256gf",
            "h200_141gb",
            nodes=max(1, ranks // 8),
            gpus_per_node=min(ranks, 8),
            overrides=options,
        )
        step_here = here.time.forward + here.time.backward
        step_there = there.time.forward + there.time.backward
        share = computing / step_here + there.time.sinkhorn / step_there
        rows.append(
            {
                "ranks": ranks,
                "measured here, ms": round(1e3 * computing, 1),
                "arithmetic of the step here, by the planner, s": round(step_here, 1),
                "communication on H200, by the planner, ms": round(1e3 * there.time.sinkhorn, 3),
                "arithmetic on H200, by the planner, s": round(step_there, 2),
                "share of the step's arithmetic": round(share, 5),
            }
        )
    return rows


def batchnorm(repeats: int) -> list[Row]:
    """Measures a layer forward and backward; SyncBatchNorm of torch and Apex need CUDA."""
    rows = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(16, 208, 20, 20).contiguous(memory_format=memory_format).requires_grad_()
        layers: dict[str, nn.Module] = {
            "torch's BatchNorm2d": nn.BatchNorm2d(208),
            "ours, alone": GroupedSyncBatchNorm(208),
            "ours, a group of one": GroupedSyncBatchNorm(208, dist.group.WORLD),
        }

        def run(layer: nn.Module, x: torch.Tensor = x) -> None:
            layer(x).square().mean().backward()

        found = in_turns(
            [lambda layer=layer, run=run: run(layer) for layer in layers.values()],  # type: ignore[misc]
            10 * repeats,
        )
        for name, seconds in zip(layers, found, strict=True):
            rows.append(
                {
                    "format": str(memory_format).removeprefix("torch."),
                    "layer": name,
                    "ms": round(1e3 * seconds, 2),
                    "against torch's": round(seconds / found[0], 2),
                }
            )
    elsewhere = "not measured: CUDA only"
    names = ("SyncBatchNorm of torch", "SyncBatchNorm of Apex")
    return [
        *rows,
        *({"format": "", "layer": name, "ms": elsewhere, "against torch's": ""} for name in names),
    ]


def strategy_seconds(names: Sequence[str], repeats: int) -> list[float]:
    """Measures the seconds of a step of each strategy; every rank of a group calls it."""
    steps = []
    for name in names:
        options = arguments("regnety_400mf", 4)
        config = configuration(*[o for o in options if "strategy" not in o], *STRATEGIES[name])
        engine, _ = build_engine(config)

        def step(engine: Any = engine, config: Any = config) -> None:
            forward_and_backward(engine, config)
            engine.step()

        steps.append(step)
    return in_turns(steps, repeats)


def strategies(repeats: int) -> list[Row]:
    """Measures every strategy on two processes of one thread each."""
    names = [name for name in STRATEGIES if name != "hsdp"]
    found = fresh(2, strategy_seconds, names, repeats)[0]
    return [
        {
            "strategy": name,
            "ms a step": round(1e3 * seconds, 1),
            "against ddp": round(seconds / found[0], 2),
        }
        for name, seconds in zip(names, found, strict=True)
    ]


def larc(repeats: int) -> list[Row]:
    """Measures SliceSGD with LARC on a 16 GF trunk, beside a copy of as much memory."""
    model = build_model(LARC_TRUNK, head_dims=[256, 64], head_batch_norm=False, prototypes=300)
    initialise(model, 0)
    optimizer = SliceSGD(
        parameter_groups(model, unit_rows=frozenset()),
        lr=0.01,
        momentum=0.9,
        weight_decay=1e-5,
        trust_coefficient=1e-3,
    )
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter).mul_(1e-3)
    source, target = torch.randn(count), torch.empty(count)

    def step() -> None:
        optimizer.step()
        optimizer.take_grad_norm()

    stepping, copying = in_turns([step, lambda: target.copy_(source)], repeats)
    bandwidth = 2 * source.nbytes / copying
    reached = LARC_TRAFFIC * count / stepping
    return [
        {
            "tensors": len(parameters),
            "parameters": f"{count / 1e6:.1f} M",
            "ms a step": round(1e3 * stepping, 1),
            "GB/s of the least traffic": round(reached / 1e9, 1),
            "GB/s of copying": round(bandwidth / 1e9, 1),
            "share of copying": round(reached / bandwidth, 2),
        }
    ]


def startup(repeats: int) -> list[Row]:
    """Measures the start of a fresh interpreter with all files in the page cache."""
    commands = {
        "launch/pretrain.py --help": ["launch/pretrain.py", "--help"],
        "launch/evaluate.py --help": ["launch/evaluate.py", "--help"],
        "launch/plan.py --help": ["launch/plan.py", "--help"],
        "import seer_scale": ["-c", "import seer_scale"],
        "import torch": ["-c", "import torch"],
    }

    def run(command: list[str]) -> None:
        subprocess.run(
            [sys.executable, *command], cwd=record.ROOT, check=True, stdout=subprocess.DEVNULL
        )

    found = in_turns(
        [lambda command=command: run(command) for command in commands.values()],  # type: ignore[misc]
        min(repeats, 5),
    )
    return [
        {"command": name, "s": round(seconds, 2)}
        for name, seconds in zip(commands, found, strict=True)
    ]


def overhead(repeats: int) -> list[Row]:
    """Measures one trainer in turns, whole and bare: the bare one only computes."""
    from harness.jobs import write_images
    from seer_scale.data import open_source
    from seer_scale.train import build

    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "images", 64)
        argv = [
            *("--recipe", RECIPE, *arguments("regnety_400mf", 8)),
            *(f"data.path={folder}/images", f"run.dir={folder}/run", "train.precision=fp32"),
            *("sharding.sync_bn_group_size=0", f"tracking.uri=sqlite:///{folder}/mlflow.db"),
        ]
        config = parse(argv, recipes=record.ROOT / "launch" / "recipes", ranks=1).config
        source = open_source(config.data.path)
        trainer = build.trainer_of(
            config, ds_config=None, source=source, resume=None, device=torch.device("cpu")
        )

        def bare() -> None:
            batch = next(trainer.images)
            embeddings, scores = trainer.engine(batch.crops, None)
            value, _ = trainer.objective(embeddings, scores)
            trainer.engine.backward(value)
            trainer.engine.step()

        def whole() -> None:
            trainer.log(trainer.train_step().metrics)

        bare_seconds, whole_seconds = in_turns([bare, whole], 2 * repeats)
        trainer.close("KILLED")
    return [
        {
            "bare step, ms": round(1e3 * bare_seconds, 1),
            "in the trainer, MLflow on, ms": round(1e3 * whole_seconds, 1),
            "overhead": round(whole_seconds / bare_seconds - 1, 4),
        }
    ]
