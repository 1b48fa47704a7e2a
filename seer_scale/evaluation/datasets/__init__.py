"""Labelled images: class folders, VOC, COCO and lists of file names."""
