"""Configuration of a run: keys, recipes, DeepSpeed's JSON. Nothing here imports torch."""

from seer_scale.config.run_config import RunConfig

__all__ = ["RunConfig"]
