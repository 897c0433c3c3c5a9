"""Numba kernels for experts, the thread team that runs them, and the instruction-set choice."""
