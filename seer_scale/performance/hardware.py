"""Hardware profiles: peak, memory and links of a GPU, as the vendor states them or as measured."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from seer_scale.config.schema import build
from seer_scale.config.yaml_text import read_yaml
from seer_scale.errors import ConfigError, did_you_mean
from seer_scale.performance.processor import processor_field

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).with_name("hardware")
# Share of a nominal bandwidth, of memory or links, that counts where there is no measurement.
ACHIEVED = 0.8

Positive = Annotated[float, Field(gt=0)]


class _Part(BaseModel):
    # Not strict: YAML writes 900 for 900.0.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Rate(_Part):
    """A bandwidth in GB/s in one direction: nominal, as the vendor states it, and measured."""

    nominal: Positive
    measured: Positive | None

    @property
    def bytes_per_second(self) -> float:
        """Bytes per second for estimates: measured, or else `ACHIEVED` times nominal."""
        return 1e9 * (self.measured or ACHIEVED * self.nominal)


class Peaks(_Part):
    """TFLOP/s of dense matrix products, by value of `train.precision`."""

    nominal: dict[str, Positive]
    measured: dict[str, Positive] | None


class Latency(_Part):
    """Microseconds that a message takes from rank to rank, beyond the transfer of its bytes."""

    intra: Positive
    inter: Positive


class Hardware(_Part):
    """One GPU, or one CPU process, with its share of the links; read from a file of `hardware/`.

    Attributes:
        name: name for people.
        device_names: names of the device by torch (GPU) or Linux (CPU).
        generation: generation of the device; devices of a generation share an efficiency.
        memory_gib: memory of a rank in GiB.
        on_touch: whether memory counts only once it is written to.
        reserved_gib: part of the memory that tensors cannot use: context, workspaces, gaps.
        peak_tflops: peak by precision.
        bandwidth_gb_s: bandwidth of the memory.
        intra_node_gb_s: bandwidth from a rank to the other ranks of its node.
        inter_node_gb_s: a rank's share of the network of its node.
        latency_us: latency of a message.
        efficiency: share of the peak that the convolutions of a RegNet reach.
        efficiency_source: source of the efficiency.
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
        """Memory for tensors in GiB."""
        return self.memory_gib - self.reserved_gib

    def peak(self, precision: str) -> float:
        """Peak operations per second (FLOP/s).

        Args:
            precision: value of `train.precision`; `apex-o1` has the peak of `amp-o1`, float16.

        Raises:
            ConfigError: if the hardware does not have the precision.
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
    """Names of all profiles in `hardware/`, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def hardware_of(device: str) -> Hardware | None:
    """Finds the profile whose `device_names` contain `device`; None if no profile does."""
    profiles = map(load_hardware, names())
    return next((known for known in profiles if device in known.device_names), None)


def device_name(device: torch.device) -> str:
    """Name of a device: a GPU by torch, a processor by Linux."""
    if device.type == "cuda":
        import torch  # here, because `--help` names the profiles

        return torch.cuda.get_device_name(device)
    return processor_field("model name") or platform.machine()


def load_hardware(name: str) -> Hardware:
    """Loads a hardware profile.

    Args:
        name: name of a file of `hardware/` without ending, or path of a YAML file.

    Raises:
        ConfigError: if no profile has this name, or the file is not a profile.
    """
    own = name.endswith((".yaml", ".yml"))
    path = Path(name) if own else FOLDER / f"{name}.yaml"
    if not path.is_file() or (not own and name not in names()):
        hint = did_you_mean(name, names())
        raise ConfigError(
            f"there is no hardware {name!r}{hint or ':'} the profiles are {', '.join(names())}, or "
            "give the path of a .yaml file like theirs"
        )
    text = path.read_text(encoding="utf-8")
    return build(Hardware, read_yaml(text, where=str(path)), where=f"{path}: ")
