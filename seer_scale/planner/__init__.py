"""Runs before they run: what a configuration takes on some hardware, and the best that fits."""

from seer_scale.performance.hardware import Hardware, load_hardware
from seer_scale.planner.plan import plan
from seer_scale.planner.planned import Plan
from seer_scale.planner.search import search

__all__ = ["Hardware", "Plan", "load_hardware", "plan", "search"]
