"""Every kernel once, on small odd shapes: what compute-sanitizer looks at.

compute-sanitizer --tool memcheck python -m benchmarks.gpu.every_kernel
"""

from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gpu.attention import run_attention
from benchmarks.gpu.bench import Bench, Shape
from benchmarks.gpu.contestants import FusedLayer, TiledExpert
from benchmarks.gpu.experts import Experts, route
from moe_offload.gpu_kernels.launch import Kernel, Kernels, Macros
