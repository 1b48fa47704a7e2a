"""The model zoo: plain torch modules, independent of processes, objectives and configuration."""

from seer_scale.models.align import align_channels, paddings_of
from seer_scale.models.classifier import Classifier, build_classifier
from seer_scale.models.initialise import initialise, seeded_values
from seer_scale.models.multicrop import MultiCropModel, build_model
from seer_scale.models.on_trunk import OnTrunk
from seer_scale.models.regnet import TRUNKS, RegNetConfig, build_trunk

__all__ = [
    "TRUNKS",
    "Classifier",
    "MultiCropModel",
    "OnTrunk",
    "RegNetConfig",
    "align_channels",
    "build_classifier",
    "build_model",
    "build_trunk",
    "initialise",
    "paddings_of",
    "seeded_values",
]
