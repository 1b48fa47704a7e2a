"""Addresses: which one is used, and that no credential survives in what gets written."""

from __future__ import annotations

from pathlib import Path

import pytest

from seer_scale.errors import ConfigError
from seer_scale.tracking.uri import environment, one_line, redact, resolve_uri, with_credentials


def test_explicit_then_environment_then_embedded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://env:1")
    assert resolve_uri("http://given:2") == "http://given:2"
    assert resolve_uri(None) == "http://env:1"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert resolve_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    assert resolve_uri("sqlite:///deep/x.db") == f"sqlite:///{tmp_path}/deep/x.db"
    assert resolve_uri("sqlite:////abs/x.db") == "sqlite:////abs/x.db"


@pytest.mark.parametrize("uri", ["./mlruns", "file:///tmp/mlruns", "/data/mlruns"])
def test_a_plain_folder_is_refused_by_name(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.uri is '.*mlruns'"):
        resolve_uri(uri)


@pytest.mark.parametrize(
    ("uri", "clean"),
    [
        ("http://u:p@host:5000/x", "http://host:5000/x"),
        ("https://token@host", "https://host"),
        ("postgresql+psycopg2://u:p%40q@db/ml", "postgresql+psycopg2://db/ml"),
        ("http://u:p@q@host", "http://host"),
        ("postgresql://db/ml?user=u&password=p", "postgresql://db/ml?user=u&password=***"),
        ("sqlite:////data/a@b/mlflow.db", "sqlite:////data/a@b/mlflow.db"),
        ("no uri, but me@example.org", "no uri, but me@example.org"),
        ('{"a": "http://h/x", "b": "c@d"}', '{"a": "http://h/x", "b": "c@d"}'),
    ],
)
def test_redact(uri: str, clean: str) -> None:
    assert redact(uri) == clean
    assert redact(f"failed: {uri} twice {uri}") == f"failed: {clean} twice {clean}"


def test_credentials_travel_by_environment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment("https://u%40x:p%2Fq@host/ml") == {
        "MLFLOW_TRACKING_URI": "https://host/ml",
        "MLFLOW_TRACKING_USERNAME": "u@x",
        "MLFLOW_TRACKING_PASSWORD": "p/q",
    }
    secret = "postgresql://u:p@db/ml"
    assert environment(secret) == {"MLFLOW_TRACKING_URI": secret}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", secret)
    assert with_credentials("postgresql://db/ml") == secret
    assert with_credentials("postgresql://other/ml") == "postgresql://other/ml"


def test_an_error_becomes_one_short_clean_line() -> None:
    line = one_line(RuntimeError("at http://u:p@h\n" + "x" * 1000))
    assert line.startswith("at http://h xxx")
    assert len(line) < 310
    assert one_line(KeyError()) == "KeyError"
