"""One question a file, with its result in results/. Run from the root: `python -m benchmarks.NAME [--smoke]`."""
