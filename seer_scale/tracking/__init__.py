"""Records of a run in files, terminal and MLflow; a slow or dead server never delays training.

`Tracker` appends to a spool in the run folder; a sender process delivers the spool to MLflow.
"""

from seer_scale.tracking.null_tracker import NullTracker
from seer_scale.tracking.spool import Tracker
from seer_scale.tracking.start import start_tracking

__all__ = ["NullTracker", "Tracker", "start_tracking"]
