"""Decode attention"""

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.few_tokens import Row


def attention(bench: Bench, copy_gb_per_s: float) -> list[Row]:
    return []
