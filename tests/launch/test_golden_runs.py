"""Short real runs of every strategy, step by step against a plain loop in float64.

What lies between a configuration and the verified parts is held here: the rate that the trainer
sets, the steps without prototypes, accumulation, the queue, the options of the optimizer, the order
of the images. The loop is torchvision's RegNet on whole batches, SwAV and LARC as their papers have
them, and the schedules of docs/config.md. It takes initial weights and crops from the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.regnet import BlockParams, RegNet

from harness.jobs import ROOT, lines, write_images
from seer_scale.data import MultiCrop, build_loader, open_source
from seer_scale.data.device import finish
from seer_scale.distributed.ports import free_port
from seer_scale.models import build_model, initialise
from tests.launch.test_pretrain import PRETRAIN, launch

pytestmark = pytest.mark.launch

SEED, STEPS, RANKS, MICRO_BATCH, ACCUMULATION = 3, 6, 2, 2, 2
TOGETHER = RANKS * MICRO_BATCH  # images whose codes are balanced, and whose BatchNorm is, at once
SIZES, COUNTS, SCALES = (48, 32), (2, 2), ((0.4, 1.0), (0.2, 0.6))
CROPS, ASSIGN = sum(COUNTS), 2
HEAD, PROTOTYPES = (24, 12), 10
# The queue joins in the middle of the third step: after 5 of 12 micro-batches of all ranks.
QUEUE, QUEUE_START = 2 * TOGETHER, 5
TEMPERATURE, EPSILON, ITERATIONS = 0.2, 0.07, 4
# Large numbers, so that whatever is left out shows a step later, at a calm rate.
BASE_LR, WARMUP, FROZEN, END_RATIO = 0.01, 3, 2, 0.05
MOMENTUM, DECAY, TRUST = 0.8, 0.1, 1.0
# Relative difference of the first step that is allowed, and its growth from step to step. Weights
# that differ by 1e-7, as rounding makes them, moved losses by 1e-7 (first step) to 5e-5 (sixth) and
# norms by 4e-4 to 2e-2 in five trials: a ReLU that flips is a thousandth of a small gradient. Each
# option left out moves a loss by more than ten times what is allowed.
TOLERANCES = {"loss": (1e-6, 4), "grad_norm": (2e-3, 2)}

OVERRIDES = [
    *(f"run.seed={SEED}", f"train.steps={STEPS}", f"train.micro_batch_size={MICRO_BATCH}"),
    f"train.gradient_accumulation={ACCUMULATION}",
    *(f"model.head_dims={list(HEAD)}", f"model.prototypes={PROTOTYPES}"),
    *(f"objective.queue_length={QUEUE}", f"objective.queue_start_steps={QUEUE_START}"),
    *(f"objective.temperature={TEMPERATURE}", f"objective.epsilon={EPSILON}"),
    f"objective.sinkhorn_iterations={ITERATIONS}",
    *(f"optim.base_lr={BASE_LR}", f"optim.warmup_steps={WARMUP}", "optim.schedule=cosine"),
    *(f"optim.end_lr_ratio={END_RATIO}", f"optim.freeze_prototypes_steps={FROZEN}"),
    *(f"optim.momentum={MOMENTUM}", f"optim.weight_decay={DECAY}"),
    *("optim.larc=true", f"optim.trust_coefficient={TRUST}", "sharding.sync_bn_group_size=0"),
    *(f"data.crop_sizes={list(SIZES)}", f"data.crop_counts={list(COUNTS)}"),
    *(f"data.crop_scales={[list(scale) for scale in SCALES]}", "data.workers=0"),
    "tracking.enabled=false",
]
TORCHRUN = ["torchrun", "--nproc-per-node", str(RANKS), "--master-port"]
DEEPSPEED = ["deepspeed", "--num_gpus", str(RANKS), "--master_port"]
STRATEGIES = {
    "ddp": (TORCHRUN, ["sharding.strategy=ddp"]),
    "fsdp": (TORCHRUN, ["sharding.strategy=fsdp"]),
    **{
        f"zero{stage}": (
            DEEPSPEED,
            ["--deepspeed_config", str(ROOT / "ds_configs" / f"zero{stage}.json")],
        )
        for stage in (1, 2, 3)
    },
}
LONG = set(STRATEGIES) - {"ddp"}  # a launcher for each: make test-all


class PlainModel(nn.Module):
    """The network of the runs, of torch's and torchvision's own layers."""

    def __init__(self) -> None:
        super().__init__()
        stages = BlockParams.from_init_params(
            depth=6, w_0=24, w_a=24.48, w_m=2.54, group_width=8, se_ratio=0.25
        )
        self.trunk = RegNet(stages)
        width = self.trunk.fc.in_features
        self.trunk.fc = nn.Identity()
        self.head = nn.Sequential(nn.Linear(width, HEAD[0]), nn.ReLU(), nn.Linear(HEAD[0], HEAD[1]))
        self.prototypes = nn.Linear(HEAD[1], PROTOTYPES, bias=False)

    def forward(self, crops: list[Tensor]) -> Tensor:
        """Unit embeddings [crops * B, D] of crops [count * B, 3, size, size] per resolution."""
        features = torch.cat([self.trunk(resolution) for resolution in crops])
        return F.normalize(self.head(features), dim=1)


def plain_model() -> PlainModel:
    """The runs' initial weights in float64."""
    ours = build_model(
        "regnety_debug", head_dims=HEAD, head_batch_norm=False, prototypes=PROTOTYPES
    )
    initialise(ours, SEED)
    weights = {name.replace("head.layers", "head"): v for name, v in ours.state_dict().items()}
    model = PlainModel()
    model.load_state_dict(weights)
    return model.double()


def micro_batches(images: Path) -> Iterator[list[Tensor]]:
    """What both ranks see at once, in the order of the stream: it does not depend on ranks."""
    with build_loader(
        open_source(str(images)),
        MultiCrop(SIZES, COUNTS, SCALES),
        seed=SEED,
        micro_batch_size=TOGETHER,
        workers=0,
    ) as loader:
        for batch in loader:
            crops = finish(batch, torch.device("cpu")).crops
            yield [resolution.double() for resolution in crops]


def plain_rate(step: int) -> float:
    """Learning rate of a step, counted from 0, on one node."""
    peak = BASE_LR * TOGETHER * ACCUMULATION / 256
    end = peak * END_RATIO
    if step < WARMUP:
        return end + (peak - end) * step / WARMUP
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


def plain_codes(scores: Tensor) -> Tensor:
    """Sinkhorn's codes [B, K] of scores [B, K] (arXiv 2006.09882, appendix A)."""
    q = torch.exp(scores / EPSILON).T  # [K, B]
    q = q / q.sum()
    for _ in range(ITERATIONS):
        q = q / q.sum(dim=1, keepdim=True) / len(q)
        q = q / q.sum(dim=0, keepdim=True) / len(scores)
    return q.T * len(scores)


def plain_loss(model: PlainModel, embeddings: Tensor, queue: list[Tensor]) -> Tensor:
    """SwAV's loss of embeddings [crops * B, D]; `queue` [R, D] for each crop that gives codes."""
    scores = model.prototypes(embeddings).view(CROPS, TOGETHER, PROTOTYPES)
    losses = []
    for assign in range(ASSIGN):
        with torch.no_grad():
            balanced = torch.cat([scores[assign], model.prototypes(queue[assign])])
            codes = plain_codes(balanced)[:TOGETHER]
        for crop in range(CROPS):
            if crop != assign:
                predicted = F.log_softmax(scores[crop] / TEMPERATURE, dim=1)
                losses.append(-(codes * predicted).sum(dim=1).mean())
    return torch.stack(losses).mean()


def plain_loop(images: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl, computed by one process on whole batches and whole tensors."""
    model, batches = plain_model(), micro_batches(images)
    momenta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    seen: list[Tensor] = []  # embeddings of every micro-batch so far, [crops, B, D]
    found = []
    for step in range(STEPS):
        rate, losses = plain_rate(step), []
        model.zero_grad()
        for _ in range(ACCUMULATION):
            embeddings = model(next(batches))
            queue = [embeddings[:0]] * ASSIGN
            if len(seen) >= QUEUE_START:
                newest = torch.cat(seen[-QUEUE // TOGETHER :], dim=1)
                queue = [newest[crop] for crop in range(ASSIGN)]
            loss = plain_loss(model, embeddings, queue)
            (loss / ACCUMULATION).backward()
            losses.append(loss.item())
            seen.append(embeddings.detach().view(CROPS, TOGETHER, -1))
        squares = 0.0
        for name, p in model.named_parameters():
            if name.startswith("prototypes") and step < FROZEN:
                continue
            assert p.grad is not None
            squares += p.grad.square().sum().item()
            with torch.no_grad():
                p_norm, g_norm = p.norm(), p.grad.norm()
                update = p.grad
                if p_norm > 0 and g_norm > 0:
                    ratio = TRUST * p_norm / (g_norm + DECAY * p_norm + 1e-8)
                    update = ratio * (p.grad + DECAY * p)
                momenta[name].mul_(MOMENTUM).add_(update)
                p.sub_(rate * momenta[name])
                if name.startswith("prototypes"):
                    p.div_(p.norm(dim=1, keepdim=True))
        found.append(
            {
                "step": step + 1,
                "lr": rate,
                "loss": sum(losses) / ACCUMULATION,
                "grad_norm": math.sqrt(squares),
                "samples_seen": (step + 1) * ACCUMULATION * TOGETHER,
            }
        )
    return found


def column(table: list[dict[str, Any]], name: str) -> list[Any]:
    return [line[name] for line in table]


def too_far(
    found: list[dict[str, Any]], golden: list[dict[str, Any]], name: str
) -> list[tuple[int, float, float]]:
    """Step, value and expected value wherever a column differs by more than its tolerance."""
    first, growth = TOLERANCES[name]
    return [
        (step, actual, expected)
        for step, (actual, expected) in enumerate(
            zip(column(found, name), column(golden, name), strict=True), start=1
        )
        if not abs(actual / expected - 1) < first * growth ** (step - 1)
    ]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def golden(images: Path) -> list[dict[str, Any]]:
    return plain_loop(images)


@pytest.mark.parametrize(
    "strategy",
    [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in STRATEGIES],
)
def test_a_run_is_the_plain_loop(
    images: Path, golden: list[dict[str, Any]], tmp_path: Path, strategy: str
) -> None:
    launcher, more = STRATEGIES[strategy]
    command = [*launcher, str(free_port()), PRETRAIN, "--recipe", "debug", *OVERRIDES]
    paths = [f"data.path={images}", f"run.dir={tmp_path / 'run'}"]
    done = launch([*command, *paths, *more], tmp_path)
    assert done.returncode == 0, done.stderr
    found = lines(tmp_path / "run")
    assert column(found, "step") == column(golden, "step")
    assert column(found, "samples_seen") == column(golden, "samples_seen")
    assert column(found, "lr") == pytest.approx(column(golden, "lr"), rel=1e-12)
    assert too_far(found, golden, "loss") == []
    assert too_far(found, golden, "grad_norm") == []
