"""Computes the roofline of one step by the planner: operations, bytes and collectives of a rank.

    python benchmarks/roofline.py [--write]

Nothing is timed. `--write` puts the table into docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without installing

from benchmarks import record
from seer_scale.models import TRUNKS
from seer_scale.planner import Plan, plan
from seer_scale.planner.step_time import traffic

COMMAND = "python benchmarks/roofline.py --write"
DOCUMENT = record.ROOT / "docs" / "performance.md"
NODES, PER_NODE = 64, 8  # SEER's 512 GPUs
CASES = (
    ("seer_256gf", "v100_32gb", "amp-o1"),
    ("seer_256gf", "h200_141gb", "bf16"),
    ("seer_rg10b", "h200_141gb", "bf16"),
)


def column(recipe: str, hardware: str, precision: str) -> tuple[str, list[str]]:
    """Makes the column of a case: operations, bytes and seconds of a rank in a step."""
    found: Plan = plan(
        recipe,
        hardware,
        nodes=NODES,
        gpus_per_node=PER_NODE,
        overrides=[f"train.precision={precision}"],
    )
    batch, time = found.batch, found.time
    images = batch.micro_batch_size
    moved = images * sum(traffic(TRUNKS[found.model.trunk], batch, found.recomputed))
    done = images * (found.flops.training + found.flops.recompute)
    sent = {kind: size / 2**30 for kind, size in found.bytes_per_step.items() if size}
    terms = {
        "convolutions and linear layers": time.forward + time.backward + time.recompute,
        "BatchNorm, ReLU, SE: memory": time.memory_bound,
        "SyncBatchNorm's collectives": time.sync_batch_norm,
        "gathering weights": time.sharding,
        "reducing gradients": time.gradients,
        "codes": time.sinkhorn,
        "optimizer": time.optimizer,
        "waiting for the host": time.host,
    }
    return f"{recipe}, {hardware}, {precision}", [
        str(images),
        f"{done / 1e12:.1f} TFLOP",
        f"{moved / 2**30:.1f} GiB",
        f"{done / moved:.0f} FLOP a byte",
        ", ".join(f"{kind} {size:.2g} GiB" for kind, size in sent.items()),
        *(f"{1e3 * seconds:.1f} ms ({seconds / time.total:.1%})" for seconds in terms.values()),
        f"{1e3 * time.total:.0f} ms",
        f"{found.mfu:.1%}",
    ]


ROWS = (
    "images a rank",
    "operations, recomputation included",
    "bytes of BatchNorm, ReLU, SE",
    "intensity",
    "sent by collectives",
    "convolutions and linear layers",
    "BatchNorm, ReLU, SE: memory",
    "SyncBatchNorm's collectives, waited for",
    "gathering weights, waited for",
    "reducing gradients, waited for",
    "codes",
    "optimizer",
    "waiting for the host",
    "step",
    "MFU",
)


def main() -> None:
    """Prints the table; --write also puts it into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write into docs/performance.md")
    given = parser.parse_args()
    titles, columns = zip(*(column(*case) for case in CASES), strict=True)
    rows = [list(row) for row in zip(ROWS, *columns, strict=True)]
    text = record.markdown([f"{NODES * PER_NODE} ranks", *titles], rows)
    print(text)
    if given.write:
        record.put_into(DOCUMENT, "roofline", f"`{COMMAND}`\n\n{text}")


if __name__ == "__main__":
    main()
