"""moe_offload, transformers, and transformers with accelerate: the same model object, the same `generate`."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.generation.streamers import BaseStreamer

import moe_offload
from moe_offload.options import Dense, Weights

BATCHED = "batched_mm"  # copies the experts' weights for every token
_FOR_ITS_PROMPTS = "grouped_mm"


class Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when each step's tokens come. after_prompt: called when a prompt's first new token is there."""

    def __init__(self, after_prompt: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._after_prompt = after_prompt

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:  # the first is the prompt
            self._after_prompt()

    def end(self) -> None:
        pass


class TorchEngine:
    """A transformers model, whoever runs its experts."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def describe(self) -> dict[str, Any]:
        return {"version": f"torch {torch.__version__}, transformers {transformers.__version__}"}

    @torch.inference_mode()
    def logits(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        rows: list[NDArray[np.float32]] = [
            self._model(torch.tensor([prompt])).logits[0].float().numpy() for prompt in prompts
        ]
        return np.stack(rows)

    def prefill(self, prompt: list[int]) -> float:
        started = time.perf_counter()
        return self._times([prompt], 1)[0] - started

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        times = self._times(prompts, new_tokens)
        return [after - before for before, after in zip(times, times[1:], strict=False)]

    def _times(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """When each new token was there."""
        ids, clock = torch.tensor(prompts), Clock(self._after_prompt)
        # without an end token, as llama.cpp's loop: to suppress it costs some 0.2 ms a step
        settings = transformers.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, pad_token_id=0)
        self._model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=settings, eos_token_id=None, streamer=clock
        )
        return clock.times[1:]

    def _after_prompt(self) -> None:
        """A prompt has run, its decoding begins."""


class OffloadEngine(TorchEngine):
    """moe_offload. weights, dense: options of `moe_offload.load`; packs are kept beside the checkpoint."""

    def __init__(self, folder: str, weights: Weights, dense: Dense, threads: int) -> None:
        _prepare(threads)
        packs = Path(folder).parent / "packs"
        super().__init__(moe_offload.load(folder, weights=weights, dense=dense, threads=threads, pack_dir=packs))

    def describe(self) -> dict[str, Any]:
        options = self._model.offload.options
        settings = {name: getattr(options, name) for name in ("weights", "dense", "activations", "threads")}
        return {**super().describe(), "moe_offload": moe_offload.__version__, **settings}


class TransformersEngine(TorchEngine):
    """transformers, by the experts implementation that was chosen last."""

    def __init__(self, folder: str, threads: int) -> None:
        _prepare(threads)
        super().__init__(transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
        self._implementation = ""

    def choose(self, implementation: str) -> None:
        """One of transformers' names."""
        if implementation != self._implementation:
            self._model.set_experts_implementation(implementation)
            self._implementation = implementation

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        """As of `Engine`. The prompts of `batched_mm` run by another one: there is no memory for them."""
        if self._implementation == BATCHED:
            self._model.set_experts_implementation(_FOR_ITS_PROMPTS)
        return super().decode(prompts, new_tokens)

    def _after_prompt(self) -> None:
        if self._implementation == BATCHED:
            self._model.set_experts_implementation(BATCHED)

    def describe(self) -> dict[str, Any]:
        return {**super().describe(), "experts_implementation": self._implementation}


class AccelerateEngine(TorchEngine):
    """transformers with accelerate: `cpu_bytes` of weights in memory, the others in `offload_folder`."""

    def __init__(self, folder: str, offload_folder: str, cpu_bytes: int, threads: int) -> None:
        _prepare(threads)
        super().__init__(
            transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16, device_map="auto", max_memory={"cpu": cpu_bytes},
                offload_folder=offload_folder,
            )
        )  # fmt: skip


def _prepare(threads: int) -> None:
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
