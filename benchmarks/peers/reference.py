"""Exact logits: transformers' own modules in f32, one layer's weights in memory at a time."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.peers.gguf_file import ARCHITECTURES
from benchmarks.peers.rounding import rounded
from benchmarks.peers.stored import StoredTensors, read_config


@torch.inference_mode()
def exact_logits(folder: Path, prompts: list[list[int]], kind: str) -> NDArray[np.float32]:
    """Logits [prompts, tokens, vocabulary] in f32 arithmetic from the weights as GGUF type `kind` holds them."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.set_experts_implementation("eager")
    body = model.model
    body.rotary_emb = type(body.rotary_emb)(config)  # its frequencies are computed, not loaded
    weights = _Weights(folder, kind)
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        model.get_submodule(name).load_state_dict({"weight": weights.one(f"{name}.weight")}, assign=True)
    for number, layer in enumerate(body.layers):
        layer.register_forward_pre_hook(
            lambda layer, _, number=number: layer.load_state_dict(weights.layer(number, layer), assign=True) and None
        )
        layer.register_forward_hook(lambda layer, *_: layer.to("meta") and None)
    logits: NDArray[np.float32] = model.eval()(torch.tensor(prompts), use_cache=False).logits.numpy()
    return logits


class _Weights:
    """The checkpoint's tensors under transformers' names, rounded."""

    def __init__(self, folder: Path, kind: str) -> None:
        self._stored = StoredTensors.open(folder)
        self._kind = kind
        self._config = read_config(folder)
        self._architecture = ARCHITECTURES[self._config["model_type"]]

    def one(self, name: str) -> torch.Tensor:
        values = torch.from_numpy(self._stored.float32(name))
        # llama.cpp keeps norms and routers in f32.
        return values if values.dim() == 1 or name.endswith(".gate.weight") else rounded(values, self._kind)

    def layer(self, number: int, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Layer `number`'s parameters, by their names in `layer`."""
        before = f"model.layers.{number}"
        block = f"{before}.{self._architecture.block}"
        found: dict[str, torch.Tensor] = {}
        for name, parameter in layer.named_parameters():
            if ".experts." in name:
                found[name] = self._experts(f"{block}.experts", name.rpartition(".")[2], parameter.shape)
            elif name.startswith("mlp."):
                found[name] = self.one(f"{block}.{name.removeprefix('mlp.')}")
            else:
                found[name] = self.one(f"{before}.{name}")
        return found

    def _experts(self, prefix: str, name: str, shape: Any) -> torch.Tensor:
        """gate_up_proj [experts, 2 * inner, hidden] or down_proj [experts, hidden, inner]."""
        gate, up, down = self._architecture.matrices
        matrices = {"gate_up_proj": (gate, up), "down_proj": (down,)}[name]
        stacked = torch.empty(shape)
        for expert, target in enumerate(stacked):
            parts = [self.one(f"{prefix}.{expert}.{matrix}.weight") for matrix in matrices]
            torch.cat(parts, out=target)
        return stacked
