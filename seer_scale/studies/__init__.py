"""Scaling studies: runs over model sizes, fitted power laws, and a report."""
