"""Files that strangers and their tools look for: there, readable, and agreeing with the rest."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from harness.jobs import ROOT
from seer_scale import __version__

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
BIN = Path(sys.executable).parent


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def commands(workflow: Path) -> list[str]:
    """The lines that the jobs of a workflow run, once for every entry of a job's matrix."""
    found = []
    for job in yaml.safe_load(workflow.read_text())["jobs"].values():
        rows = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        lines = [step["run"] for step in job.get("steps", []) if "run" in step]
        found += [
            line.replace("${{ matrix.verb }}", row.get("verb", ""))
            for row in rows
            for line in lines
        ]
    return found


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == __version__
    assert f"## [{__version__}] - {citation['date-released']}\n" in CHANGELOG
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_every_job_is_a_command_of_the_makefile() -> None:
    verbs = {line.removeprefix("make ") for line in commands(ROOT / ".github/workflows/ci.yml")}
    assert verbs == {"check", "quick", "long", "coverage", "oldest", "demo", "audit"}
    for verb in verbs:
        assert re.search(rf"^{verb}:.* ## ", MAKEFILE, re.MULTILINE), verb
        assert f"`make {verb}`" in (ROOT / "CONTRIBUTING.md").read_text()
    assert "make docs" in commands(ROOT / ".github/workflows/docs.yml")
    assert re.search(r"^test: check quick ", MAKEFILE, re.MULTILINE)
    assert re.search(r"^test-all: test long ", MAKEFILE, re.MULTILINE)
    assert 'for verbs in "demo" "test test-all"; do' in (ROOT / ".ci" / "run").read_text()


def test_every_python_that_the_metadata_names_is_tested() -> None:
    rows = read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["include"]
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text())
    assert sorted({row["python"] for row in rows}, key=Version) == named


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_by_commit_and_jobs_may_only_read(path: Path) -> None:
    text = path.read_text()
    used = re.findall(r"uses: (?!\./)(.*)", text)
    assert used or "uses: ./" in text
    for action in used:
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action
    assert yaml.safe_load(text)["permissions"] == {"contents": "read"}


def test_a_name_of_an_action_has_one_commit() -> None:
    used = {line for path in WORKFLOWS for line in re.findall(r"uses: (\S+@.*)", path.read_text())}
    assert len({line.split("@")[0] for line in used}) == len(used)


def test_dependabot_watches_packages_and_actions() -> None:
    updates = read(".github/dependabot.yml")["updates"]
    assert {update["package-ecosystem"] for update in updates} == {"pip", "github-actions"}
    assert all(update["groups"] for update in updates)


def test_hooks_are_programs_of_the_environment() -> None:
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    hooks = {hook["name"]: hook for hook in repo["hooks"]}
    assert {"ruff check", "ruff format", "codespell", "large files", "private keys"} <= hooks.keys()
    assert hooks["mypy"]["stages"] == ["pre-push"]
    for hook in hooks.values():
        program = hook["entry"].split()[0].removeprefix(".venv/bin/")
        done = subprocess.run([BIN / program, "--help"], capture_output=True, check=False)
        assert done.returncode == 0, program


def test_a_private_key_a_large_file_and_a_misspelling_are_refused(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = {
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": "safe.directory",
            "GIT_CONFIG_VALUE_0": "*",
        }
        subprocess.run(["git", *words], cwd=tmp_path, check=True, env={**os.environ, **who})

    (tmp_path / ".pre-commit-config.yaml").write_text(
        (ROOT / ".pre-commit-config.yaml").read_text().replace(".venv/bin", str(BIN))
    )
    (tmp_path / "key.txt").write_text("-----BEGIN RSA " + "PRIVATE KEY-----\n")
    (tmp_path / "large.bin").write_bytes(bytes(600 * 1024))
    (tmp_path / "text.md").write_text("Seperate" + " the two.\n")  # codespell:ignore
    git("init", "--quiet")
    git("add", ".")
    done = subprocess.run(
        [BIN / "pre-commit", "run", "--color=never"],
        env={**os.environ, "PRE_COMMIT_HOME": str(tmp_path / "home")},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    failed = re.findall(r"^(.+?)\.+Failed$", done.stdout, re.MULTILINE)
    assert failed == ["codespell", "large files", "private keys"], done.stdout


def pins(lock: str) -> dict[str, Version]:
    found = re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / lock).read_text(), re.MULTILINE)
    return {name: Version(version) for name, version in found}


def requirements(monkeypatch: pytest.MonkeyPatch) -> list[Requirement]:
    keywords = metadata(monkeypatch)
    lines = [*keywords["install_requires"], *chain(*keywords["extras_require"].values())]
    return [Requirement(line) for line in lines]


def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The keywords that setup.py hands to setuptools."""
    caught: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **keywords: caught.update(keywords))
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / "setup.py"))
    return caught


def test_the_locks_agree_with_setup_py(monkeypatch: pytest.MonkeyPatch) -> None:
    newest, oldest = pins("requirements.lock"), pins(".ci/oldest.lock")
    for wanted in requirements(monkeypatch):
        name = wanted.name.lower()
        assert wanted.specifier.contains(newest[name]), f"{wanted}: run make lock"
        assert wanted.specifier.contains(oldest[name]), f"{wanted}: run make lock"
        assert oldest[name] <= newest[name]
    for lock in ("requirements.lock", ".ci/oldest.lock"):
        assert not re.search(r"://|^-", (ROOT / lock).read_text(), re.MULTILINE)


def test_the_oldest_lock_is_what_setup_py_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a lower bound was never published, the lock has the next version: x.y.z for x.y."""
    oldest = pins(".ci/oldest.lock")
    for wanted in requirements(monkeypatch):
        (bound,) = [Version(s.version) for s in wanted.specifier if s.operator in (">=", "==")]
        assert oldest[wanted.name.lower()].release[: len(bound.release)] == bound.release, wanted


@pytest.mark.parametrize("page", ["README.md", "docs/quick-start.md"])
def test_a_page_installs_this_version_with_extras_that_there_are(
    monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    text = (ROOT / page).read_text()
    wheels = re.findall(r'pip install "(?:dist/)?(seer_scale\S+\.whl)\[([\w,]+)\]"', text)
    clones = re.findall(r'pip install "(seer-scale)\[([\w,]+)\] @ git\+URL"', text)
    assert [name for name, _ in wheels] == [f"seer_scale-{__version__}-py3-none-any.whl"]
    assert len(clones) == 1
    extras = {extra for _, asked in [*wheels, *clones] for extra in asked.split(",")}
    assert extras <= metadata(monkeypatch)["extras_require"].keys()
    assert all(f"`{extra}`" in text for extra in extras)


def test_a_wheel_names_the_repository_that_built_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_REPOSITORY", raising=False)
    assert all("arxiv.org" in url for url in metadata(monkeypatch)["project_urls"].values())
    monkeypatch.setenv("GITHUB_REPOSITORY", "Someone/fork")
    urls = metadata(monkeypatch)["project_urls"]
    assert urls["Source"] == "https://github.com/Someone/fork"
    assert urls["Documentation"] == "https://someone.github.io/fork/"


def notes(tag: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / ".ci" / "notes.py"), tag]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_notes_of_a_release_are_its_section_of_the_changelog() -> None:
    done = notes(f"v{__version__}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert done.stdout.strip() in CHANGELOG
    assert not re.search(r"^## ", done.stdout, re.MULTILINE)
    wrong = notes("v0.0.9")
    assert wrong.returncode == 1
    assert wrong.stderr == (
        f"error: the tag is v0.0.9, but must be v{__version__}, as seer_scale/__init__.py says\n"
    )


def test_a_release_without_date_or_notes_is_refused() -> None:
    section = runpy.run_path(str(ROOT / ".ci" / "notes.py"))["notes"]
    text = (
        "## [Unreleased]\n\n- b\n\n## [1.0.0] - 2026-01-02\n\n- a\n\n## [0.9.0] - 2025-01-02\n- c\n"
    )
    assert section("v1.0.0", text, "1.0.0") == "- a"
    assert section("v0.9.0", text, "0.9.0") == "- c"
    for broken in (text.replace(" - 2026-01-02", ""), text.replace("- a\n", "")):
        with pytest.raises(ValueError, match=r'no entries below "## \[1\.0\.0\] - YYYY-MM-DD"'):
            section("v1.0.0", broken, "1.0.0")


def test_issue_templates_are_forms() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[bp]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        assert all(field["attributes"]["label"] for field in form["body"])


def test_contributing_is_one_page() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert "## Proof of value" in text
    assert len(text.splitlines()) < 90
