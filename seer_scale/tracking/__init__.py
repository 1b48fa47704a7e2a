"""Experiment tracking that can be down, slow or dead without the training noticing.

`Tracker` appends to a spool in the run folder; a sender process carries it to MLflow.
"""

from seer_scale.tracking.spool import NullTracker, Tracker
from seer_scale.tracking.start import start_tracking

__all__ = ["NullTracker", "Tracker", "start_tracking"]
