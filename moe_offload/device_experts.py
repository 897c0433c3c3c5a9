"""How experts are computed on the device: which of the ways fits a token batch.

    few tokens    the fused kernels, for all experts of a launch at once (gpu_kernels/fused_experts.py)
    many tokens   one expert after the other, dequantised tiles through cuBLAS (gpu_kernels/tiled_experts.py)
    no kernels    one after the other, by torch's operations (gpu_kernels/torch_experts.py)

A virtual device computes by torch's operations and counts the launches of the kernels that a real one would start.
"""

from collections.abc import Iterable

import torch

from moe_offload.cpu_kernels.layout import Activation
from moe_offload.cpu_kernels.packed_layout import ExpertRecord
from moe_offload.expert_kernels import expert_kernels, say_without
from moe_offload.gpu_kernels.fused_experts import MAX_JOBS, MAX_PAIRS, FusedExperts, Workspace, fits
from moe_offload.gpu_kernels.launch import KernelError, Kernels
from moe_offload.gpu_kernels.tiled_experts import TiledExperts, compute_type
from moe_offload.gpu_kernels.torch_experts import DeviceActivation, DeviceRecord, TorchExperts
from moe_offload.options import Progress
from moe_offload.transfer.accelerator import Accelerator

Kind = tuple[ExpertRecord, Activation, int]  # and how many experts a layer has

# With more rows an expert, on average, matrix products are faster. A guess until it is measured on the card at hand, at
# every load (`device_costs.py`); benchmarks.gpu prints where the two cross.
FEW_ROWS = 16
TILED_LAUNCHES = 7  # of an expert whose matrices fit one tile
FUSED_LAUNCHES = 2  # of up to MAX_JOBS experts


class DeviceExperts:
    """Experts of one layout, E of a layer. `compute`: the type of products with many tokens."""

    def __init__(
        self,
        record: DeviceRecord,
        activation: DeviceActivation,
        compute: torch.dtype,
        kernels: Kernels | None,
        num_experts: int,
    ) -> None:
        self.record, self.kernels = record, kernels
        self.fused: FusedExperts | None = None
        self.many: TorchExperts | TiledExperts
        if kernels is None:
            self.many = TorchExperts(record, activation, compute)
        else:
            self.fused = FusedExperts(record, activation, kernels, num_experts)
            self.many = TiledExperts(record, activation, compute, kernels)
        self.num_experts = num_experts
        self.few_rows: float = FEW_ROWS
        self._spaces: dict[tuple[int, int], Workspace] = {}

    def few(self, tokens: int, top_k: int, rows: float | None = None) -> FusedExperts | None:
        """What runs T tokens with K choices each, if they are few and there are kernels. rows: of an expert; None for
        the average of experts that are chosen evenly.
        """
        return self.fused if self._are_few(tokens, top_k, rows) else None

    def _are_few(self, tokens: int, top_k: int, rows: float | None) -> bool:
        mean = tokens * top_k / self.num_experts if rows is None else rows
        return mean <= self.few_rows and fits(tokens, top_k)

    def space(self, tokens: int, top_k: int) -> Workspace:
        """The fused kernels' workspace for T tokens with K choices each; the same object for the same numbers."""
        assert self.fused is not None
        found = self._spaces.get((tokens, top_k))
        if found is None:
            found = self._spaces[tokens, top_k] = self.fused.workspace(tokens, top_k)
        return found

    def workspace_bytes(self, tokens: int, top_k: int) -> int:
        """Device memory that up to so many tokens take in workspaces; 0 where there are no kernels."""
        if self.fused is None:
            return 0
        return self.space(max(1, min(tokens, MAX_PAIRS // top_k)), top_k).nbytes

    def launches(self, experts: int, tokens: int, top_k: int) -> int:
        """Kernels that so many experts of a launch take."""
        return launches(experts, few=self._are_few(tokens, top_k, None))


def launches(experts: int, *, few: bool) -> int:
    """Kernels of our own that so many experts take."""
    return FUSED_LAUNCHES * -(-experts // MAX_JOBS) if few else TILED_LAUNCHES * experts


def product_type(capability: tuple[int, int] | None, stored: str, dtype: torch.dtype) -> torch.dtype:
    """What products with many tokens are computed in: float32 on the CPU (capability None); else what the card is good
    at for a model of `dtype`, but for experts that are stored with more range than float16 has: those are not looked
    through for what would be infinite.
    """
    if capability is None:
        return torch.float32
    found = compute_type(capability, dtype)
    return torch.float32 if found == torch.float16 and stored in ("bf16", "f32") else found


def device_experts(
    accelerator: Accelerator, kinds: Iterable[Kind], dtype: torch.dtype, progress: Progress | None
) -> tuple[Kernels | None, dict[Kind, DeviceExperts]]:
    """What computes a `dtype` model's experts of these kinds on `accelerator`: with our kernels, compiled, or without
    where that fails, which is said.
    """
    kinds, kernels = list(kinds), expert_kernels(accelerator)
    device, capability = accelerator.torch_device, None
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
    computes = {kind: product_type(capability, kind[0].dtype, dtype) for kind in kinds}
    if kernels is not None:
        try:
            return kernels, _made(computes, kernels, progress)
        except KernelError as error:
            say_without(accelerator.name, str(error))
    return None, _made(computes, None, progress)


def _made(
    computes: dict[Kind, torch.dtype], kernels: Kernels | None, progress: Progress | None
) -> dict[Kind, DeviceExperts]:
    found = {}
    for done, (kind, compute) in enumerate(computes.items()):
        record, activation, num_experts = kind
        found[kind] = experts = DeviceExperts(
            DeviceRecord(
                record.hidden_size, record.intermediate_size, record.dtype, record.gated, record.bias, record.group,
                record.offsets, record.nbytes,
            ),
            DeviceActivation(activation.kind, activation.alpha, activation.limit), compute, kernels, num_experts,
        )  # fmt: skip
        if experts.fused is not None:
            if progress is not None:
                progress("compiling kernels (GPU)", done, len(computes))
            experts.fused.compile()
    return found
