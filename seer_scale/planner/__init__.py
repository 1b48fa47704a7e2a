"""Memory, time and cost of a run before the run starts, and the best plan that fits."""

from seer_scale.performance.hardware import Hardware, load_hardware
from seer_scale.planner.plan import plan
from seer_scale.planner.planned import Plan
from seer_scale.planner.search import search

__all__ = ["Hardware", "Plan", "load_hardware", "plan", "search"]
