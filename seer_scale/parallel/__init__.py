"""Processes and what they share: BatchNorm groups, recomputation, and the engines that shard."""

from seer_scale.parallel.batchnorm import convert_sync_batchnorm

__all__ = ["convert_sync_batchnorm"]
