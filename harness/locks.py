"""File systems without locks, or with NFS's rule, for the processes that a test starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RULES = {
    "none": "return refuse(ENOLCK);",  # NFS without its lock daemon
    "unknown": "return refuse(ENOSYS);",  # Lustre, mounted without -o flock
    # flock(2), "NFS details": an exclusive lock becomes one for writing, a shared one for reading.
    "nfs": """
  int mode = fcntl(file, F_GETFL) & O_ACCMODE;
  if (((how & LOCK_EX) && mode == O_RDONLY) || ((how & LOCK_SH) && mode == O_WRONLY))
    return refuse(EBADF);
  return syscall(SYS_flock, file, how);""",
}
SOURCE = """
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/syscall.h>
#include <unistd.h>
static int refuse(int why) { errno = why; return -1; }
int flock(int file, int how) {
  const char *below = getenv("LOCKS_BELOW"), *on = getenv("LOCKS_WHILE");
  if (on && access(on, F_OK)) return syscall(SYS_flock, file, how);
  char name[64], path[4096] = "";
  snprintf(name, sizeof name, "/proc/self/fd/%%d", file);
  if (readlink(name, path, sizeof path - 1) < 0 || (below && strncmp(path, below, strlen(below))))
    return syscall(SYS_flock, file, how);
  %s
}
"""


@cache
def library(rule: str) -> Path:
    """Compiles a library that answers flock by one of `RULES`; deleted with this process."""
    folder = Path(_folder().name)
    source = folder / f"{rule}.c"
    source.write_text(SOURCE % RULES[rule])
    built = source.with_suffix(".so")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(built), str(source)], check=True)
    return built


def environment_with(
    rule: str, below: Path | str = "/", switch: Path | None = None
) -> dict[str, str]:
    """Environment of a process for which the files below a folder have a rule; '' for no rule.

    With a switch the rule holds while that file is there.
    """
    # A process that starts without torch still finds this clone.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    mine = {**os.environ, "PYTHONPATH": path, "PATH": f"{_bin()}:{os.environ['PATH']}"}
    rules = {"LD_PRELOAD": str(library(rule)), "LOCKS_BELOW": str(below)} if rule else {}
    return mine | rules | ({"LOCKS_WHILE": str(switch)} if switch else {})


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="locks-")


def _bin() -> Path:
    return Path(sys.executable).parent
