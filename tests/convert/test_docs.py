"""docs/convert.md's table of who has which network, made anew and compared.

`python -m tests.convert.test_docs` prints it.
"""

from __future__ import annotations

from pathlib import Path

from seer_scale.convert.names import GROUPED_TRUNKS
from seer_scale.convert.peers import TIMM, TORCHVISION
from seer_scale.models import TRUNKS

DOCS = Path(__file__).resolve().parents[2] / "docs" / "convert.md"


def table() -> str:
    rows = ["| ours | timm | torchvision | Hugging Face | VISSL |", "|---|---|---|---|---|"]
    for name, config in TRUNKS.items():
        described = "`regnety_2560` with `model_args`" if len(config.stages) == 4 else "none"
        timm = f"`{TIMM[name]}`" if name in TIMM else described
        torchvision = f"`{TORCHVISION[name]}`" if name in TORCHVISION else "`RegNet(BlockParams)`"
        layout = "`regnet_fsdp`" if name in GROUPED_TRUNKS else "`regnet`"
        rows.append(f"| `{name}` | {timm} | {torchvision} | `RegNetModel` | {layout} |")
    return "\n".join(rows)


def test_the_table_is_as_the_code_has_it() -> None:
    assert table() in DOCS.read_text()


if __name__ == "__main__":
    print(table())
