"""Findings of `seer-scale doctor` about a machine: one file for each kind of thing."""

from seer_scale.doctor.finding import Finding

__all__ = ["Finding"]
