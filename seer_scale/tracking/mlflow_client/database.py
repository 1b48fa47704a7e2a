"""The local SQLite database that MLflow keeps runs in: made by one process, whole or not at all."""

from __future__ import annotations

from pathlib import Path

from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine

from seer_scale.storage.atomic import replaced_file
from seer_scale.storage.ownership import owned

_SQLITE = "sqlite:///"


def make_database(uri: str) -> None:
    """Makes the database of `sqlite:///PATH` if there is none; does nothing for other addresses.

    MLflow makes its tables in the file itself and without a lock. Processes that start at the same
    time disturb each other, and one that is killed leaves a file that no process can use.

    Raises:
        OSError: if the disk does not take it.
    """
    path = Path(uri.removeprefix(_SQLITE))
    if not uri.startswith(_SQLITE) or path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with owned(path, str(path), beside=True, wait=True):
        if path.exists():
            return
        with replaced_file(path) as fresh:
            fresh.unlink(missing_ok=True)  # of a killed process
            engine = create_sqlalchemy_engine(f"{_SQLITE}{fresh}")
            _initialize_tables(engine)
            engine.dispose()
