"""Names that MLflow takes for registered models; it refuses others only when a model arrives."""

from __future__ import annotations

import re

LONGEST_EXPERIMENT = 500  # characters
LONGEST = 256  # characters of a column of the registry's database


def name_problem(name: str) -> str | None:
    """Says which names MLflow takes for a registered model; None if it takes this one."""
    if not name.strip() or name == "." or name.startswith(".."):
        return "no name that is blank, is '.' or begins with '..'"
    if "/" in name or ":" in name:
        return "only names without '/' and ':'"
    if len(name) > LONGEST:
        return f"only names of at most {LONGEST} characters"
    return None


def plain_name(name: str) -> str:
    """Returns a similar name that MLflow takes."""
    return re.sub(r"[/:]+", "-", name).strip("-. ")[:LONGEST] or "seer"
