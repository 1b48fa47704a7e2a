"""The optimizer and the schedules, on slices of named tensors."""
