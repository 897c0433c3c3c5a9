"""Layers all of whose experts lie on the device: nothing is to be decided, so nobody waits for the router.

With few tokens such a layer is four launches that find their experts in a table of slot addresses on the device
(`FusedExperts.add_by_table`): hidden states stay there, the host learns nothing of the routing and runs ahead. It needs
our kernels and slots for all of the model's experts: then no slot is given to another expert, and a table holds until
memory is given up (`forget`). Launches read slots by address, unseen by the accelerator's own checks; that is in order
because a table is made behind all copies, and because slots are freed only behind the compute stream.
"""

from collections.abc import Sequence

import numpy as np
import torch

from moe_offload.dispatcher import Dispatcher
from moe_offload.gpu_kernels.graph import GraphedLayer
from moe_offload.layer_tensors import LayerParts, LayerTensors
from moe_offload.transfer.accelerator import Buffer
from moe_offload.transfer.expert_cache import READY


class WholeLayers:
    """The tables of one model's layers, made when they are first wanted. graphs: replay CUDA graphs."""

    def __init__(
        self, parts: Sequence[LayerParts], tensors: LayerTensors, dispatcher: Dispatcher, *, graphs: bool = False
    ) -> None:
        self._parts, self._tensors, self._dispatcher = parts, tensors, dispatcher
        self._experts = sum(part.num_experts for part in parts)
        self._tables: dict[int, torch.Tensor] = {}
        self._graphs: list[dict[tuple[int, int, int], GraphedLayer]] | None = [{} for _ in parts] if graphs else None
        self.calls = np.zeros(len(parts), np.int64)
        self.rows = np.zeros(len(parts), np.int64)
        self.seconds = 0.0  # of the host

    def run(
        self, layer: int, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor | None:
        """The layer's output [T, H]; None where it is not whole, or the tokens are not few."""
        tokens, top_k = top_k_index.shape
        parts = self._parts[layer]
        if parts.device.few(tokens, top_k) is None:
            return None
        table = self._tables.get(layer)
        if table is None:
            table = self._make(layer)
            if table is None:
                return None
        clock = self._dispatcher.parts.accelerator.now
        began = clock()
        graphs = None if self._graphs is None else self._graphs[layer]
        out = self._tensors.run_whole(parts, table, hidden_states, top_k_index, top_k_weights, graphs)
        self.calls[layer] += 1
        self.rows[layer] += tokens * top_k
        self.seconds += clock() - began
        return out

    def forget(self) -> None:
        """Slots are about to go, or have gone: tables are made anew."""
        self._tables.clear()
        for graphs in self._graphs or ():
            graphs.clear()

    def _make(self, layer: int) -> torch.Tensor | None:
        device = self._dispatcher.parts
        if len(device.slots) < self._experts:
            return None
        slots = device.cache.slot_of(layer)
        if (slots < 0).any():
            return None
        self._dispatcher.finish_filling(pin=False)  # what is on its way
        if any(device.cache.state_of(int(slot)) != READY for slot in slots):  # or waits to be
            return None
        size = self._parts[layer].record_bytes
        buffers: list[Buffer] = [device.slots.part(int(slot), size) for slot in slots]
        addresses: list[int] = []
        self._tensors.look_at(buffers, lambda *seen: addresses.extend(each.data_ptr() for each in seen))
        table = self._tables[layer] = torch.tensor(addresses, dtype=torch.int64).to(device.accelerator.torch_device)
        return table
