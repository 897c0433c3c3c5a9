"""What runs the engine, as `moe-offload doctor` finds it: versions, threads, and settings of the environment."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

PACKAGES = ("numba", "llvmlite", "numpy", "safetensors")
# Those that `doctor_software.py` judges, and those that say where things are.
VARIABLES = (
    "OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "GOMP_CPU_AFFINITY", "KMP_AFFINITY",
    "MKL_NUM_THREADS", "NUMBA_DISABLE_JIT", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX", "NUMBA_OPT",
    "NUMBA_DEBUG", "NUMBA_CACHE_DIR", "CUDA_LAUNCH_BLOCKING", "HF_HUB_OFFLINE", "HF_HOME", "HF_HUB_CACHE",
    "PYTHONMALLOC",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SoftwareFacts:
    """`packages`: (name, version or None). `kernels`: where compiled ones are kept, None: nowhere.

    `environment`: (variable, value) of those that matter here, as they are set.
    """

    packages: tuple[tuple[str, str | None], ...] = ()
    torch_threads: int | None = None
    kernels: str | None = None
    environment: tuple[tuple[str, str], ...] = ()

    def setting(self, name: str) -> str | None:
        """Of the environment, stripped; None where it is not set, or set to nothing."""
        return dict(self.environment).get(name, "").strip() or None


def detect_software(environment: Mapping[str, str]) -> SoftwareFacts:
    """Never raises."""
    return SoftwareFacts(
        tuple((name, version_of(name)) for name in PACKAGES),
        _torch_threads(),
        _kernel_folder(),
        tuple((name, environment[name]) for name in VARIABLES if name in environment),
    )


def version_of(package: str) -> str | None:
    """None where there is none, or where its record is damaged."""
    try:
        return metadata.version(package)
    except Exception:
        return None


def _torch_threads() -> int | None:
    try:
        import torch

        return torch.get_num_threads()
    except Exception:
        return None


def _kernel_folder() -> str | None:
    try:
        from moe_offload.cpu_kernels.kernel_cache import cache_folder

        folder = cache_folder()
    except Exception:
        return None
    return None if folder is None else str(folder)
