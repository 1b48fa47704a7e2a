"""Generators of training and evaluation data, for people who have no images at hand."""
