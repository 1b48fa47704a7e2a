"""Benchmarks: each command measures something and prints, or writes, numbers of the docs."""
