"""Model and hardware FLOPs utilisation, MFU and HFU (PaLM, arXiv 2204.02311, appendix B)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Utilisation:
    """Operations of an image, and the peak of a rank's device.

    Attributes:
        model_flops: operations of an image's forward and backward pass, all crops, without
            recomputation.
        hardware_flops: the same operations with recomputation.
        peak: peak FLOP/s of a rank's device at the run's precision.
    """

    model_flops: int
    hardware_flops: int
    peak: float

    def metrics(self, images_per_second: float) -> dict[str, float]:
        """Computes `mfu` and `hfu`, shares of 1, from a rank's images per second."""
        rate = images_per_second / self.peak
        return {"mfu": rate * self.model_flops, "hfu": rate * self.hardware_flops}
