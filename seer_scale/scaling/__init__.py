"""Runs before they run: what a configuration takes on some hardware, and the best that fits."""

from seer_scale.scaling.hardware import Hardware, load_hardware
from seer_scale.scaling.plan import plan
from seer_scale.scaling.planned import Plan
from seer_scale.scaling.search import search

__all__ = ["Hardware", "Plan", "load_hardware", "plan", "search"]
