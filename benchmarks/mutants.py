"""Plants the mistakes of tests/mutants/ one by one, and tells which of them no test notices.

    python benchmarks/mutants.py [--only GLOB] [--package NAME] [--jobs N] [--fresh] [--write]
                                 [--without-golden] [--patches FOLDER] [--results FILE]

A mistake is planted in a copy of the repository, so that the working tree stays as it is. First run
the tests that the patch names, then those that import the changed module, then the golden runs;
the first failure ends it. Before a set of tests judges anything, it has to pass without a mistake.

Results are kept in build/mutants.jsonl, and what they still hold for is not run again. `--write`
puts the table into docs/mutants.md. The exit status is 1 if a patch survives without an argument,
or cannot be judged.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Literal
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import record  # noqa: E402
from benchmarks.warm_pytest import Run, WarmPytest  # noqa: E402
from harness.mutants import GOLDEN, PATCHES, Patch, files_testing, read_patches  # noqa: E402

RESULTS = ROOT / "build" / "mutants.jsonl"
PAGE = ROOT / "docs" / "mutants.md"
READ = ("seer_scale", "tests", "harness", "launch", "ds_configs", "benchmarks", "conftest.py",
        "pyproject.toml")  # fmt: skip
QUIETLY = ("-m", "not slow", "-rfE", "--tb=no", "--color=no")
MOST_FILES = 12  # test files that may judge one patch
PATIENCE, SLACK_S = 4.0, 60.0  # a mistake may make its tests so many times, and so much, slower
LONGEST_S = 1800.0  # that tests without a mistake may take
GOAL = 0.95
Verdict = Literal["killed", "survived", "not judged"]


@dataclass(frozen=True)
class Result:
    """What became of one patch.

    Attributes:
        id: `package/name`.
        patch: digest of the patch.
        tree: digest of the code and the tests.
        verdict: "not judged" if its tests fail without the mistake too.
        by: the test that failed; "timeout" if the tests did not end.
        seconds: of the runs that judged it.
    """

    id: str
    patch: str
    tree: str
    verdict: Verdict
    by: str
    seconds: float


class Bench:
    """Copies of the repository, and the runs of the tests in them."""

    def __init__(self, folder: Path, copies: int, golden: bool) -> None:
        self._golden = (GOLDEN,) if golden and (ROOT / GOLDEN).exists() else ()
        self._free: SimpleQueue[tuple[Path, WarmPytest]] = SimpleQueue()
        self._warm = [WarmPytest() for _ in range(copies)]
        for number, warm in enumerate(self._warm):
            self._free.put((copy_tree(folder / f"copy{number}"), warm))
        self._clean: dict[tuple[str, ...], Clean] = {}  # sets of tests without a mistake

    def close(self) -> None:
        """Ends the processes that tests are forked from."""
        for warm in self._warm:
            warm.close()

    @contextmanager
    def copy(self) -> Iterator[tuple[Path, WarmPytest]]:
        """Lends a copy of the repository to one thread."""
        lent = self._free.get()
        try:
            yield lent
        finally:
            self._free.put(lent)

    def check_named(self, patches: Sequence[Patch]) -> None:
        """Runs all tests that patches name, once and without a mistake."""
        sets = {patch.tests for patch in patches if patch.tests}
        if not sets:
            return
        with self.copy() as (root, warm), tempfile.TemporaryDirectory() as scratch:
            report = Path(scratch) / "report.xml"
            names = sorted({test for tests in sets for test in tests})
            ran = warm.run(root, [*QUIETLY, f"--junitxml={report}", *names], LONGEST_S)
            if not report.exists():
                raise SystemExit(f"error: the tests cannot be run:\n{ran.output[-2000:]}")
            cases = list(ElementTree.parse(report).iter("testcase"))
        for tests in sets:
            self._clean[tests] = clean_of(tests, cases)

    def judge(self, patch: Patch, tree: str) -> Result:
        """Plants a mistake and runs its tests, stage by stage, until one fails."""
        seconds = 0.0

        def result(verdict: Verdict, by: str) -> Result:
            return Result(patch.id, digest(patch), tree, verdict, by, round(seconds, 1))

        with self.copy() as (root, warm):
            for tests in self._stages(patch):
                clean = self._clean.get(tests)
                if clean is None:
                    ran = warm.run(root, ["-x", *QUIETLY, *tests], LONGEST_S)
                    failed = "" if ran.status == 0 else first_failure(ran)
                    clean = self._clean[tests] = Clean(failed, ran.seconds)
                if clean.failed:
                    return result("not judged", f"{clean.failed} fails without the mistake")
                with planted(patch, root):
                    patience = PATIENCE * clean.seconds + SLACK_S
                    ran = warm.run(root, ["-x", *QUIETLY, *tests], patience)
                seconds += ran.seconds
                if ran.status != 0:
                    return result("killed", first_failure(ran))
        return result("survived", "")

    def _stages(self, patch: Patch) -> list[tuple[str, ...]]:
        """Sets of tests that judge a patch, one after the other."""
        files = tuple(files_testing(patch.file)[:MOST_FILES])
        return [tests for tests in (patch.tests, files, self._golden) if tests]


@dataclass(frozen=True)
class Clean:
    """How a set of tests fares without a mistake: the first that fails, and their seconds."""

    failed: str
    seconds: float


def clean_of(tests: Sequence[str], cases: Sequence[ElementTree.Element]) -> Clean:
    """What a report of pytest says about some of its tests; a test that is not in it failed."""
    failed, seconds = "", 0.0
    for test in tests:
        file, _, name = test.partition("::")
        module = file.removesuffix(".py").replace("/", ".")
        mine = [
            case
            for case in cases
            if case.get("classname") == module
            and (not name or re.fullmatch(rf"{re.escape(name)}(\[.*)?", case.get("name", "")))
        ]
        bad = any(case.find(what) is not None for case in mine for what in ("failure", "error"))
        failed = failed or (test if bad or not mine else "")
        seconds += sum(float(case.get("time", 0)) for case in mine)
    return Clean(failed, seconds)


def first_failure(ran: Run) -> str:
    """Name of the test that failed first; "timeout" if the tests did not end."""
    if ran.status is None:
        return "timeout"
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", ran.output, re.MULTILINE)
    return found[1] if found else (ran.output.strip().splitlines() or ["nothing"])[-1]


def copy_tree(target: Path) -> Path:
    """Copies what git tracks, or would track, as it stands in the working tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source = ROOT / name
        if source.is_file() and not source.is_symlink():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)
    return target


@contextmanager
def planted(patch: Patch, root: Path) -> Iterator[None]:
    """Keeps the mistake in a copy for the time of the block."""
    file = root / patch.file
    before, mistaken = file.read_text(), patch.apply(root)
    # Python takes a compiled file for current if size and second of the source agree.
    compiled = Path(importlib.util.cache_from_source(str(file)))
    try:
        file.write_text(mistaken)
        compiled.unlink(missing_ok=True)
        yield
    finally:
        file.write_text(before)
        compiled.unlink(missing_ok=True)


def digest(patch: Patch) -> str:
    """Digest of what a patch changes."""
    text = json.dumps([patch.file, patch.old, patch.new])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of_tree() -> str:
    """Digest of the code and the tests, without the patches."""
    found = hashlib.sha256()
    for part in READ:
        path = ROOT / part
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            kept = file.suffix in (".py", ".json", ".yaml", ".toml") and file.is_file()
            if kept and not file.is_relative_to(PATCHES):
                found.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return found.hexdigest()[:16]


def still_holds(result: Result, patch: Patch, tree: str) -> bool:
    """Whether a result of before need not be found again.

    A patch that was killed by a test that is still there stays killed; every change of code or
    tests gives a survivor another chance.
    """
    if result.patch != digest(patch) or result.verdict == "not judged":
        return False
    if result.verdict == "survived":
        return result.tree == tree
    file, _, test = result.by.partition("::")
    name = re.match(r"\w*", test)
    path = ROOT / file
    return result.by == "timeout" or (
        path.is_file() and name is not None and f"def {name[0]}" in path.read_text()
    )


def read_results(path: Path) -> dict[str, Result]:
    """Results of before, by the patch's id; the last one of each counts."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {row["id"]: Result(**row) for row in rows}


def write_result(path: Path, result: Result) -> None:
    """Adds a result to the file, so that a killed command goes on behind it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def describe(patch: Patch, result: Result) -> str:
    """One line about a patch."""
    line = f"{result.verdict:<10} {patch.id}  ({result.seconds:.0f} s)"
    if result.by:
        line += f"  by {result.by}" if result.verdict == "killed" else f"  {result.by}"
    elif patch.argued:
        line += f"  argued: {patch.argued}"
    return line


def table(patches: Sequence[Patch], results: dict[str, Result]) -> str:
    """Killed and survived by package, and every survivor with its argument."""
    rows: list[list[str]] = []
    for package in sorted({patch.package for patch in patches}):
        found = [results[patch.id] for patch in patches if patch.package == package]
        rows.append([f"`{package}`", *_counts(found)])
    total = [results[patch.id] for patch in patches]
    rows.append(["all", *_counts(total)])
    text = record.markdown(["package", "patches", "killed", "survived", "share killed"], rows)
    alive = [patch for patch in patches if results[patch.id].verdict != "killed"]
    for patch in alive:
        text += f"\n- `{patch.id}` ({patch.why}): {patch.argued or 'no test notices it yet'}"
    return text + "\n"


def _counts(found: Sequence[Result]) -> list[str]:
    killed = sum(result.verdict == "killed" for result in found)
    share = f"{killed / len(found):.0%}"
    return [str(len(found)), str(killed), str(len(found) - killed), share]


def chosen(patches: Sequence[Patch], only: Sequence[str], packages: Sequence[str]) -> list[Patch]:
    """Patches whose id or name matches one of `only`, and whose package is one of `packages`."""
    return [
        patch
        for patch in patches
        if not packages or patch.package in packages
        if not only
        or any(fnmatch.fnmatch(patch.id, g) or fnmatch.fnmatch(patch.name, g) for g in only)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each patch and the table; 1 if one is left that nobody argues for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="repeatable")
    parser.add_argument("--package", action="append", default=[], metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1, help="patches at the same time (1)")
    parser.add_argument("--fresh", action="store_true", help="run what is known too")
    parser.add_argument("--write", action="store_true", help="write the table into docs/mutants.md")
    parser.add_argument("--without-golden", action="store_true", help="skip the golden runs")
    parser.add_argument("--patches", type=Path, default=PATCHES, metavar="FOLDER")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    options = parser.parse_args(argv)
    known = read_patches(options.patches)
    patches = chosen(known, options.only, options.package)
    if not patches:
        parser.error("no patch is chosen by --only and --package: see tests/mutants/")
    tree = digest_of_tree()
    before = {} if options.fresh else read_results(options.results)
    results = {
        patch.id: before[patch.id]
        for patch in patches
        if patch.id in before and still_holds(before[patch.id], patch, tree)
    }
    left = [patch for patch in patches if patch.id not in results]
    print(f"{len(patches)} patches, {len(left)} to judge", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        bench = Bench(Path(folder), min(options.jobs, len(left)), not options.without_golden)
        bench.check_named(left)

        def judge(patch: Patch) -> tuple[Patch, Result]:
            return patch, bench.judge(patch, tree)

        with ThreadPoolExecutor(options.jobs) as pool:
            for patch, result in pool.map(judge, left):
                results[patch.id] = result
                write_result(options.results, result)
                print(describe(patch, result), flush=True)
        bench.close()
    text = table(patches, results)
    print(f"\n{text}\n{(time.monotonic() - began) / 60:.1f} minutes")
    if options.write and patches == known:
        record.put_into(PAGE, "mutants", text)
    open_ones = [
        patch.id
        for patch in patches
        if results[patch.id].verdict == "not judged"
        or (results[patch.id].verdict == "survived" and not patch.argued)
    ]
    if open_ones:
        print(f"without an argument: {', '.join(open_ones)}", file=sys.stderr)
    return int(bool(open_ones))


if __name__ == "__main__":
    sys.exit(main())
