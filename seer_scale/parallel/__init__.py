"""Sharding strategies behind one `Engine`, and what they do to a model."""

from seer_scale.parallel.convert_batchnorm import convert_sync_batchnorm

__all__ = ["convert_sync_batchnorm"]
