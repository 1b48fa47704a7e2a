"""Commands that see a small file system of their own, by a real mount."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

# As root of this machine, or else as root of a user namespace.
WAYS = (["--mount"], ["--user", "--map-root-user", "--mount"])


def with_tmpfs(folder: Path | str, size: str) -> list[str]:
    """Returns `unshared_tmpfs`; the test is skipped where nothing may be mounted."""
    return unshared_tmpfs(folder, size) or pytest.skip("needs the right to mount, and unshare")


def unshared_tmpfs(folder: Path | str, size: str) -> list[str]:
    """Returns the beginning of a command that sees an empty tmpfs in a folder.

    Args:
        folder: where it is mounted.
        size: as mount takes it: `64m`.

    Returns:
        Words that the command follows; none where nothing may be mounted.
    """
    mount = f'mount -t tmpfs -o size={size} tmpfs {folder} && exec "$@"'
    for way in WAYS:
        command = ["unshare", *way, "sh", "-c", mount, "sh"]
        if (
            shutil.which("unshare")
            and not subprocess.run([*command, "true"], capture_output=True, check=False).returncode
        ):
            return command
    return []
