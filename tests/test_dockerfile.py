"""The Dockerfile: what hadolint says, and its RUN lines executed without Docker.

Every stage is an overlay over this machine's own files: apt-get and uv do what they would do in the
image, and nothing of it stays. Not executed: the lines that build Apex (they need nvcc and
GitHub), and what differs between this machine and the base image.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from harness.jobs import ROOT

BUILD_ARGUMENTS = {"FAIRSCALE": "0.4.13"}
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# How this machine reaches package indexes; a builder has its own way.
INDEXES = {k: v for k, v in os.environ.items() if k.startswith(("PIP_", "UV_", "SSL_", "http"))}


def instructions() -> list[tuple[str, str]]:
    """Keyword and the rest of every instruction, continuation lines joined, comments gone."""
    found, text = [], ""
    for line in (ROOT / "Dockerfile").read_text().splitlines():
        if line.lstrip().startswith("#"):
            continue
        text += line.removesuffix("\\")
        if text.strip() and not line.endswith("\\"):
            keyword, _, rest = text.strip().partition(" ")
            found.append((keyword, rest.strip()))
            text = ""
    return found


def test_hadolint_has_nothing_to_say() -> None:
    program = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([program, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_it_is_what_was_promised() -> None:
    found = instructions()
    last = max(n for n, (keyword, _) in enumerate(found) if keyword == "FROM")
    final = dict(found[last:])
    assert final["USER"] == "1000:1000"
    # deepspeed as process 1 ignores SIGTERM; torchrun waits, and a stop of 300 s has to cover that.
    assert json.loads(final["ENTRYPOINT"])[0] == "torchrun"
    environment = dict(pair.split("=", 1) for pair in shlex.split(environments(found[last:])))
    assert 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 300
    assert "docker stop -t 300" in (ROOT / "docs" / "containers.md").read_text()
    assert environment["PYTHONSAFEPATH"] == "1"
    assert final["HEALTHCHECK"].endswith('CMD ["seer-scale", "doctor", "--quick"]')
    arguments = {rest.partition("=")[0] for keyword, rest in found if keyword == "ARG"}
    assert {"BASE", "BUILD_BASE", "APEX", "FAIRSCALE"} <= arguments
    pinned = next(rest for keyword, rest in found if rest.startswith("UV_VERSION"))
    assert pinned.partition("=")[2] in (ROOT / "Makefile").read_text()
    # Nothing that is copied is kept from the builder by .dockerignore.
    allowed = context_names()
    for keyword, rest in found:
        if keyword == "COPY" and "--from" not in rest:
            for source in rest.split()[:-1]:
                assert source == "." or source.split("/")[0] in allowed, source


def environments(found: list[tuple[str, str]]) -> str:
    return " ".join(rest for keyword, rest in found if keyword == "ENV")


def context_names() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return [line.removeprefix("!") for line in lines if line.startswith("!")]


@dataclass
class Stage:
    """An image as it grows: what was written over this machine, environment, folder and user."""

    upper: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": SYSTEM_PATH})
    folder: str = "/"
    user: str = "0:0"

    def run(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Executes a line with /bin/sh in this stage."""
        work, merged = self.upper.with_suffix(".work"), self.upper.with_suffix(".merged")
        for folder in (self.upper, work, merged):
            folder.mkdir(exist_ok=True)
        inner = f"cd {self.folder} && exec /bin/sh -c {shlex.quote(command)}"
        script = (
            f"mount -t overlay overlay -o lowerdir=/,upperdir={self.upper},workdir={work} "
            f"{merged} && for d in dev sys; do mount --rbind /$d {merged}/$d; done && "
            f"mount -t proc proc {merged}/proc && "
            f"exec chroot --userspec={self.user} {merged} /bin/sh -c {shlex.quote(inner)}"
        )
        return subprocess.run(
            ["unshare", "--mount", "sh", "-c", script],
            env={"HOME": "/root", **INDEXES, **self.environment, **more},
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    def expand(self, text: str, arguments: dict[str, str]) -> str:
        """`text` with $NAME and ${NAME} filled in."""
        for name, value in {**arguments, **self.environment}.items():
            text = text.replace(f"${{{name}}}", value).replace(f"${name}", value)
        return text


def overlays_work(folder: Path) -> bool:
    (folder / "probe").mkdir()
    try:
        return Stage(folder / "probe" / "upper").run("true").returncode == 0
    except OSError:
        return False


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """A folder that does not stay: an image has gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_every_run_line_runs(scratch: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("apt-get") or not overlays_work(scratch):
        pytest.skip("needs root, apt-get and the right to mount overlays")
    context = scratch / "context"
    context.mkdir()
    for name in context_names():
        subprocess.run(["cp", "-r", str(ROOT / name), str(context)], check=True)
    stages: dict[str, Stage] = {}
    executed, last = [], ""
    arguments: dict[str, str] = {}
    entrypoint: list[str] = []
    health: list[str] = []
    for keyword, rest in instructions():
        if keyword == "FROM":
            source, _, name = rest.partition(" AS ")
            last = name or "final"
            parent = stages.get(source)
            stages[last] = Stage(scratch / last)
            if parent:  # links, as both are read more than written
                subprocess.run(["cp", "-al", str(parent.upper), str(scratch / last)], check=True)
                stages[last].environment = dict(parent.environment)
                stages[last].folder = parent.folder
            continue
        stage = stages.get(last)
        if keyword == "ARG":
            name, _, value = rest.partition("=")
            arguments[name] = BUILD_ARGUMENTS.get(name, value.strip('"'))
            continue
        assert stage is not None
        if keyword == "ENV":
            for pair in shlex.split(rest):
                name, _, value = pair.partition("=")
                stage.environment[name] = stage.expand(value, {})
        elif keyword == "WORKDIR":
            stage.folder = rest
            (stage.upper / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif keyword == "USER":
            stage.user = rest
        elif keyword == "COPY":
            *sources, target = rest.split()
            if sources[0].startswith("--from="):
                origin = stages[sources.pop(0).removeprefix("--from=")].upper
                sources = [str(origin / source.lstrip("/")) for source in sources]
                into = stage.upper / target.lstrip("/")
                into.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run(["cp", "-al", sources[0], str(into)], check=True)
            else:
                into = stage.upper / stage.folder.lstrip("/") / target
                into.mkdir(parents=True, exist_ok=True)
                for source in sources:
                    name = f"{source}/." if (context / source).is_dir() else source
                    subprocess.run(["cp", "-r", f"{context}/{name}", str(into)], check=True)
        elif keyword == "RUN":
            done = stage.run(rest, **arguments)
            assert done.returncode == 0, f"{rest}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
            executed.append(rest)
        elif keyword == "HEALTHCHECK":
            health = json.loads(rest.partition("CMD ")[2])
        elif keyword == "ENTRYPOINT":
            entrypoint = json.loads(rest)
    assert len(executed) == sum(keyword == "RUN" for keyword, _ in instructions())

    final = stages[last]
    checked = final.run(shlex.join(health))
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert "torch            2." in checked.stdout
    written = final.run("id -u && touch /workspace/mine && ! touch /opt/venv/mine")
    assert written.returncode == 0, written.stderr
    assert written.stdout == "1000\n"
    launcher = shlex.join(entrypoint).replace("auto", "1")
    options = "--recipe debug --deepspeed_config ds_configs/zero2.json"
    asked = final.run(f"{launcher} {options}", HOME="/workspace")
    assert "data path data/demo/train does not exist" in asked.stderr, asked.stderr
    fairscale = final.run("python3 -c 'import fairscale; print(fairscale.__version__)'")
    absent = final.run("python3 -c 'import pytest'")
    assert fairscale.stdout.strip() == BUILD_ARGUMENTS["FAIRSCALE"], fairscale.stderr
    assert absent.returncode != 0  # neither tests nor linters are in the image
