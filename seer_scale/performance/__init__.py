"""Costs of a model and the speed of a run: operations, hardware peaks, utilisation, profiles."""
