"""What the program itself takes in a decode step on this machine, measured on the bundled demo model.

The demo model's weights are read in no time, so a step of it is Python, launches and barriers: once with all layers in
one launch, once through transformers' modules. From the two come the seconds of a step, of a fused layer and of a
module.
"""

import time
from collections.abc import Callable
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from moe_offload.model_folder import DEMO_FOLDER

_TOKENS = 20
_FUSED_LAYER = 25e-6  # of stages and barriers: too little to be told from the step by one model
_LEAST = 1e-6


class ProgramTimes(NamedTuple):
    """Seconds of a step beside its layers, of a fused layer, and of a module of transformers'."""

    step: float
    layer: float
    module: float


def measure_program(threads: int, report: Callable[[str, float], None]) -> ProgramTimes:
    """Load the demo model both ways and time its steps."""
    from moe_offload.loading import load
    from moe_offload.plan_sizes import PlannedModel

    seconds = []
    for number, fused in enumerate((True, False)):
        report("timing the program's own part", number / 2)
        before = logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{**kwargs, "disable": True}))
        try:
            model: Any = load(
                DEMO_FOLDER, weights="bf16", threads=threads, device="cpu", predictor="off", fused_decode=fused
            )
        finally:
            logging.set_tqdm_hook(before)
        try:
            _step_seconds(model)
            seconds.append(_step_seconds(model))
        finally:
            model.offload.close()
    sizes = PlannedModel(DEMO_FOLDER).sizes("bf16")
    step = max(seconds[0] - sizes.num_layers * _FUSED_LAYER, _LEAST)
    module = max((seconds[1] - step) / (sizes.num_layers * sizes.modules), _LEAST)
    return ProgramTimes(step, _FUSED_LAYER, module)


def _step_seconds(model: Any) -> float:
    clock = _Clock()
    ids = torch.arange(3, 19)[None]
    model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=_TOKENS, min_new_tokens=_TOKENS, do_sample=False,
        streamer=clock,
    )  # fmt: skip
    times = clock.times[1:]
    return median(later - earlier for earlier, later in zip(times, times[1:], strict=False))


class _Clock(BaseStreamer):  # type: ignore[misc]
    """When each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
