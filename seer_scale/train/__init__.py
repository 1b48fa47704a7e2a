"""The step, the loop around the step, and the faults that a run survives."""
