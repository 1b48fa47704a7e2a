"""Registers a trunk in MLflow's model registry: `seer-scale register SOURCE --name NAME`.

A run registers its own checkpoints; use this command for other weights, names or servers. The same
weights under the same name stay one version, however often they are registered.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

from seer_scale.config.argument_types import command_parser
from seer_scale.config.home_folder import expand_home

EXAMPLES = """\
SOURCE is what seer_scale.load takes: a run, a checkpoint, an exported trunk, or foreign weights,
which are registered under our names. Weights of a tracked run stay with that MLflow run.

  seer-scale register runs/demo --name photographs --alias production
  seer-scale register seer_regnet32gf.torch --name seer-32gf --uri http://mlflow:5000
"""
EXPERIMENT = "registered"


def parser() -> argparse.ArgumentParser:
    """Builds the argument parser."""
    parser = command_parser(__doc__, EXAMPLES)
    parser.add_argument("source", type=expand_home, metavar="SOURCE")
    parser.add_argument("--name", required=True, help="name of the registered model")
    parser.add_argument(
        "--alias",
        action="append",
        default=[],
        help="points at this version from now on; repeatable",
    )
    parser.add_argument(
        "--uri",
        type=expand_home,
        help="MLflow server (the run's own, else MLFLOW_TRACKING_URI, else sqlite:///mlflow.db)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Runs the command; returns 0, or raises `UserError`."""
    arguments = parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="seer-scale-") as scratch:
        print(register(arguments.source, arguments.name, arguments.alias, arguments.uri, scratch))
    return 0


def register(source: str, name: str, aliases: list[str], uri: str | None, scratch: str) -> str:
    """Registers the trunk of `source`; returns a sentence with name and version.

    Args:
        source: see `seer_scale.load`.
        name: name of the registered model.
        aliases: aliases that shall point at the version.
        uri: address of the server; see `--uri`.
        scratch: a folder with room for two copies of the weights.

    Raises:
        UserError: there is no such source, or the server does not answer or refuses.
        CheckpointError: the weights are damaged or are not a known trunk.
    """
    from seer_scale.convert import convert
    from seer_scale.convert.locating import locate
    from seer_scale.errors import UserError
    from seer_scale.evaluation.report import find_origin, server_of
    from seer_scale.serving import WEIGHTS
    from seer_scale.tracking.quiet import quieten
    from seer_scale.tracking.uri import answers, environment, redact

    server = server_of(source, uri)
    if not answers(server):
        raise UserError(f"{redact(server)} does not answer: is it the address, and is it up?")
    folder = locate(source, server)
    if not (folder / WEIGHTS).is_file():
        folder = Path(scratch) / "trunk"
        convert(source, "safetensors", folder)
    os.environ.update(environment(server))
    quieten()
    from seer_scale.tracking.mlflow_client import register_trunk

    origin = find_origin(source, server)
    version = register_trunk(
        os.environ["MLFLOW_TRACKING_URI"],
        folder,
        name=name,
        aliases=aliases,
        run_id=origin.run_id,
        step=origin.step or 0,
        experiment=EXPERIMENT,
        scratch=Path(scratch),
    )
    return f"{source} is version {version} of {name} at {redact(server)}: models:/{name}/{version}"
