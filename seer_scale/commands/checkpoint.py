"""Looks after checkpoints: `seer-scale checkpoint list|inspect|verify|consolidate|prune PATH`.

No GPU and no process group is needed, and memory only for the largest tensor.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from seer_scale.config.argument_types import at_least, command_parser
from seer_scale.config.home_folder import expand_home, local_path
from seer_scale.errors import CheckpointError, UserError

GIB = 2**30
EXAMPLES = """\
PATH is a checkpoint, or a run or its checkpoints folder, which mean the newest of theirs.

  seer-scale checkpoint list runs/demo
  seer-scale checkpoint inspect runs/demo
  seer-scale checkpoint verify runs/demo/checkpoints/step_00000320
  seer-scale checkpoint consolidate runs/demo --to exported --largest-file 5
  seer-scale checkpoint prune runs/demo --keep 2 --keep-every 100
"""


def show(path: str) -> None:
    """Prints a line for each checkpoint of a run: step, images, size, time, trunk and k-NN."""
    from seer_scale.checkpoint.finding import checkpoints_at
    from seer_scale.checkpoint.manifest import MANIFEST, read_manifest, step_of
    from seer_scale.tracking.records import kept_knn, trained_knn

    folders = checkpoints_at(path)
    run_dir = folders[0].resolve().parents[1]
    trained = trained_knn(run_dir)
    rows = [("step", "images seen", "GiB", "saved", "trunk", "k-NN top-1", "folder")]
    for folder in reversed(folders):
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            rows.append((str(step_of(folder)), "", "", "", "", "", f"{folder}: {error}"))
            continue
        knn = kept_knn(run_dir, manifest["step"]) or trained.get(manifest["step"])
        saved = datetime.fromtimestamp((folder / MANIFEST).stat().st_mtime)
        total = sum(stamp.bytes for stamp in manifest["files"].values())
        rows.append(
            (
                str(manifest["step"]),
                f"{manifest.get('state', {}).get('samples_seen', 0):,}",
                f"{total / GIB:.3f}",
                f"{saved:%Y-%m-%d %H:%M}",
                "yes" if (folder / "trunk").is_dir() else "no",
                f"{100 * knn['top1']:.2f} %" if knn else "",
                str(folder),
            )
        )
    _table(rows)


def inspect(path: str, tensors: bool = False) -> None:
    """Prints the origin and the size of a checkpoint, and with `tensors` its files and tensors."""
    from seer_scale.checkpoint import CheckpointReader

    reader = CheckpointReader(_newest(path))
    manifest = reader.manifest
    config: dict[str, Any] = manifest.get("config", {})
    state = manifest.get("state", {})
    rows = [
        ("checkpoint", str(reader.folder)),
        ("format", str(manifest["format"])),
        ("step", str(manifest["step"])),
        ("samples seen", str(state.get("samples_seen", "not stated"))),
        ("recipe", str(config.get("recipe", "not stated"))),
        ("trunk", str(manifest["trunk"])),
        ("strategy", str(config.get("sharding", {}).get("strategy", "not stated"))),
        ("precision", str(config.get("train", {}).get("precision", "not stated"))),
        ("world size", str(manifest["world_size"])),
        ("versions", ", ".join(f"{k} {v}" for k, v in manifest.get("versions", {}).items())),
    ]
    files = manifest["files"]
    total = sum(stamp.bytes for stamp in files.values())
    kinds = reader.kinds
    parameters = sum(kind.numel for name, kind in kinds.items() if reader.has_momentum(name))
    rows += [
        ("files", f"{len(files)}, {total / GIB:.3f} GiB"),
        ("tensors", f"{len(kinds)}, {parameters:,} parameters with momentum"),
        ("of each rank", ", ".join(reader.local_state(0)) or "nothing"),
    ]
    _table(rows)
    if not tensors:
        return
    print()
    _table([("file", "GiB", "xxh128")] + [
        (name, f"{stamp.bytes / GIB:.3f}", stamp.xxh128[:16]) for name, stamp in files.items()
    ])  # fmt: skip
    print()
    parts = [("tensor", "shape", "dtype", "elements")]
    for name, (dtype, shape) in kinds.items():
        kind = "buffer" if not reader.has_momentum(name) else ""
        size = f"{kinds[name].numel:,}"
        parts.append(
            (name, "x".join(map(str, shape)) or "1", f"{str(dtype)[6:]} {kind}".strip(), size)
        )
    _table(parts)


def verify(path: str) -> None:
    """Reads every file and compares its checksum."""
    from seer_scale.checkpoint import CheckpointReader

    reader = CheckpointReader(_newest(path))
    if problem := reader.verify():
        raise UserError(f"{reader.folder} is damaged: {problem}; resume from another checkpoint")
    files = reader.manifest["files"]
    total = sum(stamp.bytes for stamp in files.values())
    print(f"{reader.folder} is whole: {len(files)} files, {total / GIB:.3f} GiB")


def join(path: str, to: Path | None, largest_gib: float | None, momentum: bool) -> None:
    """Writes whole tensors of a checkpoint into one or several safetensors files."""
    from seer_scale.checkpoint import CheckpointReader
    from seer_scale.checkpoint.consolidate import consolidate

    reader = CheckpointReader(_newest(path))
    target = to or reader.folder.with_name(f"{reader.folder.name}_consolidated")
    largest = None if largest_gib is None else int(largest_gib * GIB)
    consolidate(reader, target, largest_bytes=largest, momentum=momentum, say=print)


def prune(path: str, keep: int, keep_every: int | None, dry_run: bool) -> None:
    """Deletes checkpoints beyond the newest `keep`, but never the newest whole one."""
    from seer_scale.checkpoint import CheckpointReader, list_checkpoints
    from seer_scale.checkpoint.folders import delete
    from seer_scale.checkpoint.retention import expired

    root = Path(path)
    saved = list_checkpoints(root) or list_checkpoints(root / "checkpoints")
    if not saved:
        raise UserError(f"{path} holds no checkpoints: give a run or its checkpoints folder")
    old = expired(saved, keep=keep, keep_every=keep_every)
    if old:  # those that stay have to be good for something before others go
        newest = CheckpointReader(saved[-1])
        if problem := newest.verify():
            raise UserError(
                f"{newest.folder} is damaged: {problem}; nothing is deleted, since an older one "
                "may be the last that is whole"
            )
    for folder in old:
        print(f"{'would delete' if dry_run else 'deleting'} {folder}")
        if not dry_run:
            delete(folder)
    print(f"{len(saved) - len(old)} of {len(saved)} checkpoints stay")


def _newest(path: str) -> Path:
    from seer_scale.checkpoint.finding import checkpoints_at

    return checkpoints_at(path)[0]


def _table(rows: Sequence[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = command_parser(__doc__, EXAMPLES)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, text in (
        ("list", "print the checkpoints of a run"),
        ("inspect", "print how it was made and what it holds"),
        ("verify", "compare all checksums"),
        ("consolidate", "write whole tensors, streamed"),
        ("prune", "delete old checkpoints of a run"),
    ):
        verb = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        verb.add_argument("path", type=expand_home, metavar="PATH")
        if name == "inspect":
            verb.add_argument("--tensors", action="store_true", help="also files and tensors")
        if name == "consolidate":
            verb.add_argument(
                "--to", type=local_path, help="folder; else STEP_consolidated beside it"
            )
            verb.add_argument("--largest-file", type=float, metavar="GIB", help="else one file")
            verb.add_argument("--momentum", action="store_true", help="optimizer state too")
        if name == "prune":
            verb.add_argument("--keep", type=at_least(1), required=True, help="newest that stay")
            verb.add_argument("--keep-every", type=at_least(1), metavar="STEPS")
            verb.add_argument("--dry-run", action="store_true", help="only say what would go")
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns 0, or 1 after a message."""
    arguments = parser().parse_args(argv)
    match arguments.verb:
        case "list":
            show(arguments.path)
        case "inspect":
            inspect(arguments.path, arguments.tensors)
        case "verify":
            verify(arguments.path)
        case "consolidate":
            join(arguments.path, arguments.to, arguments.largest_file, arguments.momentum)
        case "prune":
            prune(arguments.path, arguments.keep, arguments.keep_every, arguments.dry_run)
    return 0
