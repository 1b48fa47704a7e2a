"""Shared by tests and benchmarks: processes, jobs, engines, parity cases, memory meters."""
