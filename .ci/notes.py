"""Prints the section of CHANGELOG.md for a release: `python .ci/notes.py v0.1.0`.

The tag must name the version of the package, and its section must have a date.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notes(tag: str, changelog: str, version: str) -> str:
    """Returns the text below the heading of the tag's version.

    Raises:
        ValueError: if the tag is not "v" and the version, or the section or its date is missing.
    """
    if tag != f"v{version}":
        raise ValueError(
            f"the tag is {tag}, but must be v{version}, as seer_scale/__init__.py says"
        )
    heading = rf"## \[{re.escape(version)}\] - \d{{4}}-\d{{2}}-\d{{2}}\n"
    found = re.search(rf"^{heading}(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    if found is None or not found[1].strip():
        raise ValueError(
            f'CHANGELOG.md has no entries below "## [{version}] - YYYY-MM-DD"; add them'
        )
    return found[1].strip()


def package_version() -> str:
    """Returns the version in seer_scale/__init__.py, without importing the package."""
    text = (ROOT / "seer_scale" / "__init__.py").read_text()
    version: str = re.findall(r'^__version__ = "(.+)"', text, re.MULTILINE)[0]
    return version


if __name__ == "__main__":
    try:
        print(notes(sys.argv[1], (ROOT / "CHANGELOG.md").read_text(), package_version()))
    except ValueError as error:
        sys.exit(f"error: {error}")
