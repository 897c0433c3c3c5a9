"""Scripts that measure, run from the repository root as `python -m benchmarks.name`."""
