"""Hardware profiles: what a GPU and its links are said to do, and what of it was measured."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from seer_scale.config.schema import did_you_mean
from seer_scale.config.yaml_text import read_yaml
from seer_scale.errors import ConfigError

FOLDER = Path(__file__).with_name("hardware")
# What of a nominal bandwidth programs get: memory and links alike, where nobody measured.
ACHIEVED = 0.8

Positive = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    # Not strict: YAML writes 900 for 900.0.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rate(_Part):
    """GB/s, one direction: as the vendor states it, and as somebody measured it."""

    nominal: Positive
    measured: Positive | None

    @property
    def bytes_per_second(self) -> float:
        """What to reckon with: the measured rate, or a share of the nominal one."""
        return 1e9 * (self.measured or ACHIEVED * self.nominal)


class Peaks(_Part):
    """TFLOP/s of dense matrix products by `train.precision`."""

    nominal: dict[str, Positive]
    measured: dict[str, Positive] | None


class Latency(_Part):
    """Microseconds that a message takes from rank to rank, beside its bytes."""

    intra: Positive
    inter: Positive


class Hardware(_Part):
    """One GPU (or one CPU process) with its share of the links; a file of `hardware/`.

    Attributes:
        name: in words.
        device_names: what torch calls such a GPU, or Linux the CPU of such a core.
        generation: those of one generation share an efficiency.
        memory_gib: of a rank.
        on_touch: whether memory is taken only when it is written to.
        reserved_gib: of it what is not tensors: context, workspaces, gaps.
        peak_tflops: by precision.
        bandwidth_gb_s: of memory.
        intra_node_gb_s: of a rank to the others of its node.
        inter_node_gb_s: a rank's share of its node's network.
        latency_us: of a message.
        efficiency: share of the peak that a RegNet's convolutions reach.
        efficiency_source: where that comes from.
    """

    name: str
    device_names: tuple[str, ...] = ()
    generation: str
    memory_gib: Positive
    on_touch: bool = False
    reserved_gib: Annotated[float, Field(ge=0)]
    peak_tflops: Peaks
    bandwidth_gb_s: Rate
    intra_node_gb_s: Rate
    inter_node_gb_s: Rate
    latency_us: Latency
    efficiency: Annotated[float, Field(gt=0, le=1)]
    efficiency_source: str

    @property
    def usable_gib(self) -> float:
        """GiB for tensors."""
        return self.memory_gib - self.reserved_gib

    def peak(self, precision: str) -> float:
        """FLOP/s at the peak.

        Args:
            precision: of `train.precision`; Apex O1 computes in float16 too.

        Raises:
            ConfigError: if the hardware has none.
        """
        peaks = self.peak_tflops.measured or self.peak_tflops.nominal
        name = "amp-o1" if precision == "apex-o1" else precision
        if name not in peaks:
            raise ConfigError(
                f"train.precision is {precision}, which {self.name} does not have: use "
                f"{' or '.join(peaks)}"
            )
        return 1e12 * peaks[name]


def names() -> list[str]:
    """Of the profiles there are."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def hardware_of(device: str) -> Hardware | None:
    """The profile whose `device_names` hold `device`; None if there is none."""
    profiles = map(load_hardware, names())
    return next((known for known in profiles if device in known.device_names), None)


def device_name(device: torch.device) -> str:
    """What torch calls a GPU, or Linux the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(found, platform.machine())


def load_hardware(name: str) -> Hardware:
    """A profile of `hardware/`, by its file's name; or a YAML file of one's own.

    Raises:
        ConfigError: if there is none of this name, or the file is no profile.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else FOLDER / f"{name}.yaml"
    if not path.is_file() or (not own and name not in names()):
        hint = did_you_mean(name, names())
        raise ConfigError(
            f"there is no hardware {name!r}{hint or ':'} the profiles are {', '.join(names())}, or "
            "give the path of a .yaml file like theirs"
        )
    try:
        return Hardware.model_validate(read_yaml(path.read_text(encoding="utf-8"), where=str(path)))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigError(f"{path}: {key}: {first['msg'].lower()}") from None
