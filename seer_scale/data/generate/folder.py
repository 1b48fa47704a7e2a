"""A generated folder that appears complete or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seer_scale.errors import DataError


@contextmanager
def complete_folder(target: Path, what: str) -> Iterator[Path]:
    """Yields a hidden folder beside `target`, which becomes `target` if the block succeeds.

    Args:
        target: a folder that is missing or empty.
        what: the name of the content in error sentences.

    Raises:
        DataError: the folder cannot be written, or `target` was filled meanwhile.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise DataError(f"{what} cannot be written to {target}: {error}") from error
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(target)  # replaces an empty folder
    except OSError as error:
        raise DataError(f"{what} cannot be written to {target}: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
