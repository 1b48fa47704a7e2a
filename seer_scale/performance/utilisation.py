"""MFU and HFU: what of the devices' peak the model's operations use (PaLM, arXiv 2204.02311, B)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Utilisation:
    """Operations of an image against the peak of a rank's device.

    Attributes:
        model_flops: of an image's forward and backward pass, all crops; no recomputation.
        hardware_flops: the same with what activation checkpointing computes again.
        peak: FLOP/s of a rank's device at the run's precision.
    """

    model_flops: int
    hardware_flops: int
    peak: float

    def metrics(self, images_per_second: float) -> dict[str, float]:
        """`mfu` and `hfu`, shares of 1, at a rank's images per second."""
        rate = images_per_second / self.peak
        return {"mfu": rate * self.model_flops, "hfu": rate * self.hardware_flops}
