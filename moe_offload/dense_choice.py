"""Which linears outside of the experts can be packed, and where their weights come from.

Attention projections, shared experts, dense MLPs and the output head; not what routes, nor what is too small, nor
towers for images and sound.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, log2

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_offload.cpu_kernels.packed_layout import WIDTH
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.compat import KeyResolver
from moe_offload.models.expert_weights import ExpertWeights
from moe_offload.models.safetensors_header import TensorRecord
from moe_offload.models.spec import MoeSpec

SMALLEST = WIDTH  # linears with fewer inputs or outputs are not worth a block
# Routing decides which experts run: a small error there is a large one. But GatedDeltaNet and its like are no routers.
_ROUTERS = re.compile(r"[Rr]outer|[Tt]op[Kk]|Gate(?!d)")
_READ_AS_TENSORS = ("dt_proj",)  # Mamba multiplies with the weight itself, at every step


@dataclass(frozen=True, slots=True)
class Source:
    """Where a linear's weight comes from: a tensor of the checkpoint, which is that of the parameter it is tied to.

    `scales` are those of FP8 in blocks.
    """

    record: TensorRecord
    scales: TensorRecord | None = None
    tied_to: str = ""

    def rows(self, checkpoint: Checkpoint, first: int, last: int, dtype: torch.dtype) -> torch.Tensor:
        """Rows first to last as a plain load gives them; a view of the file where that is what is stored."""
        stored = checkpoint.view(self.record)
        if self.scales is None:
            return stored[first:last].to(dtype)
        scales = checkpoint.view(self.scales).float()
        # The last block of a side may be cut. Blocks are of 128, or of another power of two.
        heights, widths = (
            torch.arange(size) // 2 ** ceil(log2(-(-size // count)))
            for size, count in zip(stored.shape, scales.shape, strict=True)
        )
        return (stored[first:last].float() * scales[heights[first:last]][:, widths]).to(dtype)


def dense_linears(model: PreTrainedModel, spec: MoeSpec) -> dict[str, nn.Linear]:
    """Path -> linear, for those in the decoder's layers and the output head that may be quantised."""
    modules = dict(model.named_modules(remove_duplicate=False))
    uses: dict[nn.Module, int] = {}
    for module in modules.values():
        uses[module] = uses.get(module, 0) + 1
    blocks = {layer.path.rpartition(".")[0] for layer in spec.layers}
    layers = {_outermost_list(layer.path, modules) for layer in spec.layers} - {""}
    head = model.get_output_embeddings()
    found = {}
    for path, module in modules.items():
        if type(module) is not nn.Linear or uses[module] > 1 or min(module.weight.shape) < SMALLEST:
            continue
        inside = any(path.startswith(f"{prefix}.") for prefix in layers)
        routes = path.rpartition(".")[0] in blocks or any(
            _ROUTERS.search(type(modules[above]).__name__) for above in _ancestors(path)[1:]
        )
        if (module is head or (inside and not routes)) and _is_plain(module, model.dtype):
            if path.rpartition(".")[2] not in _READ_AS_TENSORS:
                found[path] = module
    return found


def _is_plain(linear: nn.Linear, dtype: torch.dtype) -> bool:
    """Whether nobody listens to this linear, and it is where and what the CPU's kernels take.

    Weights in another dtype than the model's are those that an architecture keeps precise on purpose.
    """
    hooks = (linear._forward_hooks, linear._forward_pre_hooks, linear._backward_hooks)
    weight = linear.weight
    here = weight.device.type in ("cpu", "meta")  # on meta: nothing was loaded, what is stored is to be converted
    return here and weight.dtype == dtype and not any(hooks) and not hasattr(linear, "_hf_hook")


def _ancestors(path: str) -> list[str]:
    """'a.b.c' -> ['', 'a', 'a.b']."""
    parts = path.split(".")
    return [".".join(parts[:n]) for n in range(len(parts))]


def _outermost_list(path: str, modules: dict[str, nn.Module]) -> str:
    """The list of layers that a module is in; "" where there is none."""
    return next((above for above in _ancestors(path) if isinstance(modules[above], nn.ModuleList)), "")


def find_sources(
    model: PreTrainedModel, checkpoint: Checkpoint, experts: Iterable[ExpertWeights], linears: dict[str, nn.Linear]
) -> dict[str, Source]:
    """Where the weights of the linears come from; without those where that cannot be told."""
    own = {f"{path}.weight" for path in linears}
    tied = {
        id(parameter): name for name, parameter in model.named_parameters(remove_duplicate=False) if name not in own
    }
    expert_keys = set().union(*(weights.keys for weights in experts))
    resolve = KeyResolver(model)
    records: dict[str, TensorRecord] = {}
    for key, record in checkpoint.records.items():
        if key not in expert_keys:
            resolved = resolve(key)
            if not resolved.operations:
                records[resolved.target] = record
    sources = {}
    shared: set[int] = set()
    for path, linear in linears.items():
        tied_to = tied.get(id(linear.weight), "")
        stored = records.get(tied_to) or records.get(f"{path}.weight")
        if stored is None or stored.shape != tuple(linear.weight.shape):
            continue
        if tied_to:
            sources[path] = Source(stored, tied_to=tied_to)
        elif id(linear.weight) not in shared:
            scales = checkpoint.records.get(f"{stored.name}_scale_inv") if stored.dtype == "F8_E4M3" else None
            sources[path] = Source(stored, scales)
            shared.add(id(linear.weight))
    return sources
