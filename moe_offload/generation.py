"""One answer of a model: text as it comes, an end on demand, and how long what took."""

import copy
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from moe_offload.memory import format_bytes
from moe_offload.models.errors import CheckpointError
from moe_offload.progress import Activity, Amount
from moe_offload.statistics import Counts
from moe_offload.streaming import TextDecoder, TextStream

FinishReason = Literal["stop", "length", "interrupted"]


@dataclass(frozen=True, slots=True)
class Phase:
    """Tokens that went through the model, and the seconds it took."""

    tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """0 where there was nothing to measure."""
        return self.tokens / self.seconds if self.tokens and self.seconds else 0.0


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out.

    `cache` holds the keys and values of `cached_ids`; None where it cannot be continued.
    """

    prompt_tokens: int
    new_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    prefill: Phase  # up to the first token; of the prompt what no cache held
    decode: Phase  # from the first token on
    experts: Counts
    cache: DynamicCache | None = None
    cached_ids: tuple[int, ...] = ()

    def describe(self) -> str:
        """The line below an answer."""
        if not self.new_ids:
            return "interrupted before the first token"
        parts = []
        if self.prefill.tokens:
            parts.append(f"first token {self.prefill.seconds:.2f} s")
            parts.append(f"prefill {_rate(self.prefill)}")
        if self.decode.tokens:
            parts.append(f"decode {_rate(self.decode)}")
        if self.experts.bytes_read and self.experts.timed_bytes == self.experts.bytes_read:
            parts.append(f"experts {self.experts.gigabytes_per_second:.1f} GB/s")
        elif self.experts.bytes_read:  # fused steps: their experts' share of the time is not known
            parts.append(f"{format_bytes(self.experts.bytes_read)} of experts read")
        count = f"{len(self.new_ids)} token{'' if len(self.new_ids) == 1 else 's'}"
        ends = {
            "stop": count,
            "length": f"stopped at {count}",
            "interrupted": f"interrupted after {count}",
        }
        return ", ".join([*parts, ends[self.finish_reason]])


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int],
    config: GenerationConfig,
    *,
    on_text: Callable[[str], None],
    before: Sequence[int] = (),
    cache: DynamicCache | None = None,
    show_progress: bool = False,
) -> Generation:
    """Continue `prompt_ids` by at most `config.max_new_tokens`, calling `on_text` with each piece
    of text.

    before: the tokens that the text continues, where it does (see TextDecoder).
    cache: keys and values of a beginning of `prompt_ids`, at least one token shorter.

    Ctrl-C ends it with what there is (finish_reason "interrupted"), it raises nothing: the first
    one after the token at hand, while the prompt is read or when pressed again at once.
    """
    config = copy.copy(config)
    config.return_dict_in_generate = True  # it holds the cache
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    unread = ids.shape[1] - (cache.get_seq_length() if cache is not None else 0)
    engine: Any = model.offload
    statistics = engine.statistics
    before_all = statistics.snapshot()

    def reading() -> Amount:
        calls = (statistics.snapshot() - before_all).layer_calls
        return min(1.0, calls / len(engine.spec.layers)) * unread, unread, "tokens"

    activity = Activity("reading the prompt", enabled=show_progress, measure=reading)

    def on_token(piece: str) -> None:
        activity.end()
        on_text(piece)

    stream = TextStream(TextDecoder(tokenizer, before), on_token)
    output: Any = None
    with _Interrupts(stream) as interrupts, activity:
        try:
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                streamer=stream,
                stopping_criteria=StoppingCriteriaList([interrupts]),
                **({} if cache is None else {"past_key_values": cache}),
            )
        except KeyboardInterrupt:
            stream.end()
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise CheckpointError(
                "the model computes NaN or infinite probabilities: its weights are damaged, or "
                "the --dtype is too narrow"
            ) from error
    kept = _continuable(output)
    new_ids = tuple(stream.ids)
    return Generation(
        prompt_tokens=ids.shape[1],
        new_ids=new_ids,
        text=stream.text,
        finish_reason=_finish_reason(new_ids, config, interrupts.requested),
        prefill=Phase(unread, stream.first - stream.started),
        decode=Phase(max(0, len(new_ids) - 1), stream.last - stream.first),
        experts=statistics.snapshot() - before_all,
        cache=kept,
        cached_ids=(*prompt_ids, *new_ids)[: kept.get_seq_length()] if kept is not None else (),
    )


class _Interrupts(StoppingCriteria):  # type: ignore[misc]
    """Ctrl-C as a wish to stop after the token at hand, so that the cache stays whole.

    Before the first token there is nothing to keep, and pressed again it cannot wait: then it is a
    KeyboardInterrupt.
    """

    def __init__(self, stream: TextStream) -> None:
        self.requested = False
        self._stream = stream
        self._previous: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        return torch.full((input_ids.shape[0],), self.requested, dtype=torch.bool, device=input_ids.device)  # type: ignore[return-value]

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        at_once = self.requested or not self._stream.ids
        self.requested = True
        if at_once:
            raise KeyboardInterrupt


def _finish_reason(new_ids: Sequence[int], config: GenerationConfig, interrupted: bool) -> FinishReason:
    ends = config.eos_token_id
    if new_ids and new_ids[-1] in (ends if isinstance(ends, list) else [ends]):
        return "stop"
    return "interrupted" if interrupted else "length"


def _continuable(output: Any) -> DynamicCache | None:
    """The cache of a finished generation, if a later prompt can go on from it.

    Only plain attention can. Recurrent layers take several tokens as a new beginning, and with the
    sparse indexed attention of DeepSeek V3.2 and GLM 5 transformers 5.23 goes on to wrong logits.
    """
    cache = getattr(output, "past_key_values", None)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    if cache is not None and type(cache) is DynamicCache and all(type(layer) in plain for layer in cache.layers):
        return cache
    return None


def _rate(phase: Phase) -> str:
    speed = phase.tokens_per_second
    return f"{speed:.0f} tok/s" if speed >= 99.5 else f"{speed:.3g} tok/s"
