"""Self-supervised pretraining of billion-parameter RegNets, exact under every sharding strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from seer_scale.convert.loading import load


def __getattr__(name: str) -> Any:
    if name == "load":  # needs torch; `import seer_scale` and `--help` do not
        from seer_scale.convert.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
