"""Files that strangers and their tools look for: there, readable, and agreeing with the rest."""

from __future__ import annotations

import re
import subprocess

import yaml

from harness.jobs import ROOT
from seer_scale import __version__


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_the_workflow_runs_the_two_commands_of_the_readme() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["demo-and-test"]["steps"][-1]["run"] == ".ci/run"
    script = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"for verb in demo test; do", script)


def test_hooks_are_what_make_check_runs() -> None:
    (repo,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    names = {hook["name"] for hook in repo["hooks"]}
    assert {"ruff check", "ruff format", "mypy"} <= names
    for hook in repo["hooks"]:
        program = hook["entry"].split()[0]
        assert subprocess.run([ROOT / program, "--version"], capture_output=True).returncode == 0


def test_issue_templates_are_forms() -> None:
    for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("[bp]*.yml"):
        form = yaml.safe_load(path.read_text())
        assert {"name", "description", "body"} <= form.keys()
        assert all(field["attributes"]["label"] for field in form["body"])


def test_contributing_is_one_page() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert "## Proof of value" in text
    assert len(text.splitlines()) < 90
