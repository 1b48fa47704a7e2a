"""The normalisation of images that every trunk was pretrained with."""

# Of ImageNet, per RGB channel of values in [0, 1], as SEER's augmentation uses them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
