"""One run of a benchmark: a prompt, and steps of generation behind it.

What runs is `model.generate`, greedy, the model's end tokens ignored. It is made to follow the text: at every step the
text's own next token wins. So all settings route the same tokens, and no greedy loop makes routing easy. The time of a
prompt is that to its first token; the time of generation begins there. On a virtual device all times are the simulated
server's.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from moe_offload.bench_resources import Meter, Traffic
from moe_offload.bench_text import Ids


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. first_seconds: to the first token. seconds, traffic: of what the test is named for."""

    first_seconds: float
    seconds: float
    traffic: Traffic


def timed_generation(model: PreTrainedModel, meter: Meter, ids: Ids, prompt_tokens: int) -> Sample:
    """Run the sequences ids [B, T]: the first of their tokens are the prompts, the others are generated.

    What is timed are the steps behind the first generated token; where there is none, the prompts.
    """
    tokens = torch.from_numpy(ids).to(model.device)
    prompt, rest = tokens[:, :prompt_tokens], tokens[:, prompt_tokens:]
    marks = _Marks(meter, rest.shape[1] - 1)
    with plain_generation(model):
        marks.begin()
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=rest.shape[1], streamer=marks,
            logits_processor=LogitsProcessorList([_Follow(rest)]),
        )  # fmt: skip
    return marks.sample()


class _Marks(BaseStreamer):  # type: ignore[misc]
    """Notes the time of the first token and of the last."""

    def __init__(self, meter: Meter, steps: int) -> None:
        self._meter, self._steps = meter, steps
        self._seen = -1  # the first that comes is the prompt
        self._times: list[float] = []
        self._traffic: list[Traffic] = []

    def begin(self) -> None:
        self._traffic.append(self._meter.traffic(0))
        self._times.append(self._meter.now())

    def put(self, value: torch.Tensor) -> None:
        self._seen += 1
        if self._seen == 1:
            self._times.append(self._meter.now())
            self._traffic.append(self._meter.traffic(1))
            self._times.append(self._meter.now())
        if self._seen == 1 + self._steps and self._steps:
            self._times.append(self._meter.now())
            self._traffic.append(self._meter.traffic(1 + self._steps))

    def end(self) -> None:
        pass

    def sample(self) -> Sample:
        started, first, *rest = self._times
        if not self._steps:
            return Sample(first - started, first - started, self._traffic[1] - self._traffic[0])
        return Sample(first - started, rest[1] - rest[0], self._traffic[2] - self._traffic[1])


class _Follow(LogitsProcessor):  # type: ignore[misc]
    """Makes the text's next token the most probable, whatever the model thinks of it."""

    def __init__(self, tokens: torch.Tensor) -> None:
        """tokens: [sequences, steps]"""
        self._tokens, self._step = tokens, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores.scatter_(1, self._tokens[:, self._step : self._step + 1], float("inf"))
        self._step += 1
        return scores


@contextlib.contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Greedy, without the end tokens, penalties and the like that the model's own generation_config asks for."""
    kept = model.generation_config
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)
    try:
        with torch.inference_mode():
            yield
    finally:
        model.generation_config = kept
