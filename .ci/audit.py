"""`make audit`: known vulnerabilities of what requirements.lock pins, by pip-audit.

A database that is out of reach is no fault of the lock: one sentence, exit status 0.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOT_AUDITED = "not audited: the database of vulnerabilities cannot be reached from here, so nothing"
UNREACHABLE = re.compile(
    r"vulnerability feed|requests\.exceptions\.(Connect|Read|Proxy|SSL)|: 5\d\d Server Error"
)


def main(lock: str) -> int:
    """Audits a lock and says what was found; 1 for a finding, or if pip-audit fails otherwise."""
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        done = subprocess.run(
            [
                Path(sys.executable).with_name("pip-audit"),
                *("--requirement", lock, "--require-hashes", "--disable-pip"),
                *("--progress-spinner", "off", "--format", "json", "--output", report),
            ],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        # Its exit status is the same for a finding and a failure; a failure leaves no report.
        if report.is_file() and report.stat().st_size:
            text, status = verdict(json.loads(report.read_text())["dependencies"])
            print(text)
            return status
    if UNREACHABLE.search(done.stderr):
        print(f"{NOT_AUDITED} was looked up")
        return 0
    print(done.stderr, file=sys.stderr, end="")
    return 1


def verdict(dependencies: list[dict[str, Any]]) -> tuple[str, int]:
    """What pip-audit's report comes to, in words and as an exit status.

    A mirror without a database answers "no such package", which pip-audit counts as nothing found.
    """
    unknown = [entry["name"] for entry in dependencies if "skip_reason" in entry]
    findings = [
        f"{entry['name']} {entry['version']}: {found['id']}, "
        f"mended in {', '.join(found['fix_versions']) or 'no version'}"
        for entry in dependencies
        for found in entry.get("vulns", [])
    ]
    if findings:
        return "\n".join(findings), 1
    if len(unknown) == len(dependencies):
        return f"{NOT_AUDITED} of {len(unknown)} packages was looked up", 0
    known = len(dependencies) - len(unknown)
    missing = f"; not in the database: {', '.join(unknown)}" if unknown else ""
    return f"{known} of {len(dependencies)} packages looked up, no known vulnerability{missing}", 0


if __name__ == "__main__":
    sys.exit(main(*(sys.argv[1:] or ["requirements.lock"])))
