"""`moe-offload trace`: what a model's routers choose for the text in a file, as a file for predictors."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from moe_offload import terminal
from moe_offload.cli_options import read_utf8
from moe_offload.memory import format_bytes
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import MoeOffloadError, OptionError
from moe_offload.opening import OpenedModel
from moe_offload.pack_key import content_key
from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.trace import SPLITS, read_trace
from moe_offload.progress import BYTES, Activity
from moe_offload.prompts import encode_chat, encode_text, max_context, require_known_ids
from moe_offload.tracing import TraceResult, trace_model

_LINES = 1 << 20  # characters that are made tokens at once


@dataclass(frozen=True, slots=True)
class TraceWishes:
    """What to trace. Raises OptionError for values out of bounds."""

    prompts: Path
    output: Path
    new_tokens: int = 0
    sequence_tokens: int = 256
    max_tokens: int | None = None
    projected: int = 128
    like: Path | None = None
    note: str = ""

    def __post_init__(self) -> None:
        least = {"new-tokens": 0, "sequence-tokens": 2, "max-tokens": 1, "projected": 1}
        for name, bound in least.items():
            value = getattr(self, name.replace("-", "_"))
            if value is not None and value < bound:
                raise OptionError(f"--{name} {value} is out of bounds: it must be at least {bound}")
        if self.output.is_dir():
            raise OptionError(f"-o {self.output} is a folder: name a file")
        if not self.output.absolute().parent.is_dir():
            raise OptionError(f"-o {self.output}: there is no folder {self.output.absolute().parent}")


def trace(opened: OpenedModel, wishes: TraceWishes, *, as_json: bool) -> int:
    """Make the trace and say where it is. Returns the exit code. Raises as `make_trace`."""
    started = time.perf_counter()
    _report(make_trace(opened, wishes), time.perf_counter() - started, as_json)
    return 0


def make_trace(opened: OpenedModel, wishes: TraceWishes) -> TraceResult:
    """Load the model and trace it.

    Raises OptionError for prompts that cannot be used, MoeOffloadError when there is no place for the trace.
    """
    sequences = read_sequences(opened, wishes)
    model, _ = opened.load()
    engine: Any = model.offload
    try:
        fingerprint = content_key(engine.spec, Checkpoint.open(opened.folder))
        like = None if wishes.like is None else read_trace(wishes.like, fingerprint)
        with Activity(f"tracing {opened.options.name}", enabled=opened.options.show_progress) as activity:
            result = trace_model(
                model, sequences, wishes.output, fingerprint=fingerprint, new_tokens=wishes.new_tokens,
                projected=min(wishes.projected, engine.spec.layers[0].hidden_size), like=like, note=wishes.note,
                progress=lambda what, done, total: activity.update(
                    what, done, total, {"tracing": "tokens", "sampling": "sequences"}.get(what, BYTES)
                ),
            )  # fmt: skip
    except KeyboardInterrupt:
        terminal.note(f"interrupted: the same command goes on with what is in {wishes.output}.parts")
        raise
    except TraceError as error:
        raise MoeOffloadError(str(error)) from error
    finally:
        engine.close()
    return result


def read_sequences(opened: OpenedModel, wishes: TraceWishes) -> list[list[int]]:
    """The token ids of each sequence. Raises OptionError for what is wrong with the file."""
    path = wishes.prompts
    try:
        text = read_utf8(path.read_bytes(), str(path))
    except OSError as error:
        raise OptionError(f"cannot read the prompts {path}: {error.strerror or error}") from error
    if not text.strip():
        raise OptionError(f"{path} is empty: give text to trace")
    context = max_context(opened.config)
    if context is not None and wishes.sequence_tokens + wishes.new_tokens > context:
        raise OptionError(
            f"sequences of {wishes.sequence_tokens} tokens and {wishes.new_tokens} new ones do not fit the model's "
            f"context of {context}: give a smaller --sequence-tokens or --new-tokens"
        )
    found = _prompts if path.suffix == ".jsonl" else _pieces
    sequences: list[list[int]] = []
    left = wishes.max_tokens
    for ids in found(text, opened.tokenizer, wishes):
        if left is not None:
            left -= len(ids) + wishes.new_tokens
            if left < 0:
                break
        require_known_ids(ids, opened.config)
        sequences.append(ids)
    if not sequences and left is not None and left < 0:
        raise OptionError(f"--max-tokens {wishes.max_tokens} is less than the first sequence has")
    if not sequences:
        raise OptionError(
            f"{path} has fewer than {wishes.sequence_tokens} tokens, too few for one sequence: give more text, or a "
            "smaller --sequence-tokens"
        )
    return sequences


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, wishes: TraceWishes) -> Iterator[list[int]]:
    """A text in pieces of one length, each with what the tokenizer puts in front of a text; a rest is left out."""
    begin = _beginning(tokenizer)
    size = max(wishes.sequence_tokens - len(begin), 1)
    waiting: list[int] = []
    for part in _parts(text):
        waiting += tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(waiting) // size * size
        for at in range(0, whole, size):
            yield begin + waiting[at : at + size]
        waiting = waiting[whole:]


def _parts(text: str) -> Iterator[str]:
    """The text cut at line ends."""
    at = 0
    while at < len(text):
        end = text.find("\n", at + _LINES) + 1 or len(text)
        yield text[at:end]
        at = end


def _beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    marked: list[int] = tokenizer("a")["input_ids"]
    bare: list[int] = tokenizer("a", add_special_tokens=False)["input_ids"]
    return marked[: len(marked) - len(bare)] if bare and marked[-len(bare) :] == bare else []


def _prompts(text: str, tokenizer: PreTrainedTokenizerBase, wishes: TraceWishes) -> Iterator[list[int]]:
    """One prompt a line, its first tokens where it has too many."""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{wishes.prompts}, line {number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise OptionError(f"{where} is not JSON ({error})") from error
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        messages: Any = entry.get("messages") if isinstance(entry, dict) else None
        try:
            if isinstance(prompt, str) and prompt:
                ids = encode_text(tokenizer, prompt)
            elif _is_conversation(messages):
                ids = encode_chat(tokenizer, messages)
            else:
                raise OptionError('it needs {"prompt": "text"} or {"messages": [{"role": ..., "content": ...}]}')
        except OptionError as error:
            raise OptionError(f"{where}: {error}") from error
        yield ids[: wishes.sequence_tokens]


def _is_conversation(messages: Any) -> bool:
    return (
        isinstance(messages, list)
        and len(messages) > 0
        and all(isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content")) for m in messages)
    )


def _report(result: TraceResult, seconds: float, as_json: bool) -> None:
    size = result.path.stat().st_size
    splits = read_trace(result.path).split
    counts = {name: int((splits == number).sum()) for number, name in enumerate(SPLITS)}
    if as_json:
        said = {
            "trace": str(result.path), "bytes": size, "tokens": result.tokens, "sequences": result.sequences,
            "split": counts, "layers": result.info.layers, "experts": result.info.experts, "top_k": result.info.top_k,
            "projected": result.info.projected, "model": result.info.model, "resumed_sequences": result.resumed,
            "was_there": result.was_there, "seconds": round(seconds, 3),
        }  # fmt: skip
        terminal.write(json.dumps(said, ensure_ascii=False, indent=2) + "\n")
        return
    terminal.write(f"{result.path}\n")
    shares = ", ".join(f"{count} {name}" for name, count in counts.items())
    made = "was there already" if result.was_there else f"in {seconds:.1f} s"
    gone_on = f", {result.resumed} of them from an earlier run" if result.resumed else ""
    terminal.figures(
        f"{result.tokens} tokens in {result.sequences} sequences{gone_on} ({shares}), {format_bytes(size)}, {made}"
    )
