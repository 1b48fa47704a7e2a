"""The documentation: what is generated is up to date, links lead somewhere, examples run."""

from __future__ import annotations

import ast
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from harness.jobs import ROOT, write_images
from seer_scale.models import RegNetConfig, build_trunk
from seer_scale.models.regnet import TRUNKS
from seer_scale.objectives import build_objective
from tests.objectives.test_build import install

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
ELLIPSIS = "..."  # in a quotation: what differs


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language, without the indentation of a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", page.read_text(), re.M | re.S)
    return ["\n".join(line.removeprefix(pad) for line in text.splitlines()) for pad, text in found]


def test_the_page_of_keys_is_what_the_code_says() -> None:
    script = "runpy.run_path('docs/generate_config.py')"
    command = f"import runpy; print({script}['page'](), end='')"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert (DOCS / "config.md").read_text() == done.stdout, "run `python docs/generate_config.py`"
    assert "`sharding.sync_bn_group_size`" in done.stdout
    assert "`objective.queue_length`" in done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_lead_to_files(page: Path) -> None:
    targets = [target.partition("#")[0] for target in LINK.findall(page.read_text())]
    missing = [
        target
        for target in targets
        if target and "://" not in target and not (page.parent / target).exists()
    ]
    assert missing == []


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        children = entry.values() if isinstance(entry, dict) else entry
        return [page for child in children for page in pages(child)]

    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert sorted(pages(navigation)) == sorted(page.name for page in DOCS.glob("*.md"))


def literals() -> str:
    """Every piece of text in the package's code, one a line."""
    trees = [ast.parse(path.read_text()) for path in ROOT.glob("seer_scale/**/*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\n".join(node.value for node in nodes if isinstance(node.value, str))


def test_troubleshooting_quotes_the_program() -> None:
    said = literals()
    quotes = [
        line for block in blocks(DOCS / "troubleshooting.md", "text") for line in block.splitlines()
    ]
    assert len(quotes) > 20
    for quote in quotes:
        text = re.sub(r"^(error|warning|note): ", "", quote)
        for fragment in text.split(ELLIPSIS):
            assert fragment.strip(" ?:") in said, f"nothing in the code says {fragment!r}: {quote}"


SCRIPT = re.compile(r"(?<!tests/)\blaunch/(\w+)\.py")
LAUNCHERS = ("deepspeed", "torchrun")  # they want a file
ELSEWHERE = {"log.md", "performance.md"}  # what was, and what was measured


def scripts_without_launcher(text: str) -> list[str]:
    """Mentions of a script of launch/ that no launcher starts, in its line or the one continued."""
    found, before = [], ""
    for line in text.splitlines():
        line = before + line
        before = line if line.endswith("\\") else ""
        if not any(launcher in line for launcher in LAUNCHERS):
            found += SCRIPT.findall(line)
    return found


def test_commands_are_written_as_they_are_typed() -> None:
    """`seer-scale X`, in pages as in messages; files of launch/ only where launchers want one."""
    for page in PAGES:
        if page.name not in ELSEWHERE:
            # The README says once that the files are the commands.
            assert scripts_without_launcher(page.read_text()) == ["NAME"] * (page.stem == "README")
    for path in ROOT.glob("seer_scale/**/*.py"):
        text = path.read_text()
        # Behind launchers that stand in a variable.
        assert scripts_without_launcher(text.replace("_launcher(self)", LAUNCHERS[0])) == [], path
    assert scripts_without_launcher("`python launch/sync.py runs/x`") == ["sync"]


def example(page: Path, name: str) -> str:
    """The block of a page that defines class `name`, with what it needs to be imported."""
    (source,) = [text for text in blocks(page, "python") if f"class {name}" in text]
    return source if "import torch" in source else f"import torch\n\n{source}"


@pytest.mark.parametrize(
    ("page", "name", "options"),
    [
        (DOCS / "extending.md", "BarlowTwins", {"off_diagonal": 0.01}),
        (ROOT / "README.md", "AlignUniform", {"weight": 0.5}),
    ],
)
def test_the_example_of_an_objective_trains(
    page: Path,
    name: str,
    options: dict[str, float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = f"example_of_{name.lower()}"
    install(tmp_path, package, example(page, name), f"{name.lower()}={package}:{name}")
    monkeypatch.syspath_prepend(str(tmp_path))
    objective = build_objective(name.lower(), crops=3, options=options)
    torch.manual_seed(0)
    free = torch.randn(3 * 8, 6, requires_grad=True)
    prototypes = torch.randn(5, 6, requires_grad=True)
    optimizer = torch.optim.SGD([free, prototypes], lr=0.5)
    losses = []
    for _ in range(20):
        embeddings = torch.nn.functional.normalize(free, dim=1)
        loss, metrics = objective(embeddings, embeddings @ prototypes.T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert prototypes.grad is not None
    assert not any(torch.as_tensor(value).requires_grad for value in metrics.values())
    assert losses[-1] < 0.9 * losses[0] if losses[0] > 0 else losses[-1] < losses[0]


def test_the_example_of_a_trunk_is_the_published_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    (source,) = [text for text in blocks(DOCS / "extending.md", "python") if "TRUNKS[" in text]
    name = source.split('"')[1]
    monkeypatch.delitem(TRUNKS, name, raising=False)  # and back to what it was, afterwards
    exec(source, {"TRUNKS": TRUNKS, "RegNetConfig": RegNetConfig})
    try:
        ours = build_trunk(name, device="meta")
    finally:
        TRUNKS.pop(name)
    peer = timm.create_model("regnety_064", num_classes=0)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())


def processor_seconds() -> float:
    """What the processes that have ended took of the processors, waiting not counted."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


@pytest.mark.slow
@pytest.mark.timeout(3600)  # others may use the processors too
def test_the_quick_start_runs_in_ten_minutes(tmp_path: Path) -> None:
    """Every command of the page, as it stands there, in an empty folder."""
    page, before = DOCS / "quick-start.md", processor_seconds()
    write_images(tmp_path / "photographs", count=64)
    commands = [line for block in blocks(page, "bash") for line in block.splitlines()]
    assert len(commands) >= 8
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "seer-scale"
        done = subprocess.run(
            [sys.executable, "-m", "seer_scale", *arguments],
            cwd=tmp_path,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    for source in blocks(page, "python"):
        subprocess.run([sys.executable, "-c", source], cwd=tmp_path, env=environment(), check=True)
    # Commands of one thread each, one after the other: on an idle machine they take about so long.
    assert processor_seconds() - before < 600


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
