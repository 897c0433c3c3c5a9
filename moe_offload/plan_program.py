"""What the program itself takes in a decode step on this machine, measured on the bundled demo model.

The demo model's weights are read in no time, so a step of it is Python, launches and barriers: once with all layers in
one launch, once through transformers' modules. From the two come the seconds of a step, of a fused layer and of a
module.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from transformers.utils import logging

from moe_offload.bench_model import Test, measure
from moe_offload.model_folder import DEMO_FOLDER

_PROMPT, _TOKENS, _REPEATS = 16, 16, 5
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
            seconds.append(_step_seconds(model))
        finally:
            model.offload.close()
    sizes = PlannedModel(DEMO_FOLDER).sizes("bf16")
    step = max(seconds[0] - sizes.num_layers * _FUSED_LAYER, _LEAST)
    module = max((seconds[1] - step) / (sizes.num_layers * sizes.modules), _LEAST)
    return ProgramTimes(step, _FUSED_LAYER, module)


def _step_seconds(model: Any) -> float:
    """Of generation as `bench` measures it."""
    (found,) = measure(model, None, [Test(_PROMPT, _TOKENS)], _REPEATS, limit_mib=0)
    assert found.step_seconds is not None
    return found.step_seconds
