"""The normalisation of images is that of torchvision's pretrained networks, and of the papers."""

from __future__ import annotations

from torchvision.models import RegNet_Y_128GF_Weights

from seer_scale.preprocessing import MEAN, STD


def test_means_and_deviations_are_those_of_imagenet_in_the_order_of_rgb() -> None:
    assert MEAN == (0.485, 0.456, 0.406)
    assert STD == (0.229, 0.224, 0.225)
    theirs = RegNet_Y_128GF_Weights.IMAGENET1K_SWAG_LINEAR_V1.transforms()
    assert (theirs.mean, theirs.std) == (list(MEAN), list(STD))
