"""Studies over model size, and what they will cost."""
