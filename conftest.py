"""The fixture `distributed`: a function of a test runs on every rank of a pool of processes."""

from harness.pool import _pools, distributed  # noqa: F401
