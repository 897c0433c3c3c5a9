"""Numba kernels for experts, the thread team that runs them, and the instruction-set choice."""

from moe_offload.cpu_kernels.bandwidth import measure_read_bandwidth
from moe_offload.cpu_kernels.experts import ExpertKernel, warm_up
from moe_offload.cpu_kernels.grouping import Groups, group_tokens
from moe_offload.cpu_kernels.layout import Activation, ExpertLayout
from moe_offload.cpu_kernels.openmp_team import OpenMPTeam, find_openmp_runtime
from moe_offload.cpu_kernels.processors import default_threads
from moe_offload.cpu_kernels.team import Team, ThreadTeam

__all__ = [
    "Activation",
    "ExpertKernel",
    "ExpertLayout",
    "Groups",
    "OpenMPTeam",
    "Team",
    "ThreadTeam",
    "default_threads",
    "find_openmp_runtime",
    "group_tokens",
    "measure_read_bandwidth",
    "warm_up",
]
