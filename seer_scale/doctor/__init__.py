"""What `seer-scale doctor` looks at, a file for each kind of thing; all return `Finding`s."""

from seer_scale.doctor.finding import Finding

__all__ = ["Finding"]
