"""`generate` and `chat` once their options are checked: load, answer, and say what came of it."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from moe_offload import chat as terminal_chat
from moe_offload import terminal
from moe_offload.conversation import Conversation
from moe_offload.generation import Generation, generate
from moe_offload.models.errors import OptionError
from moe_offload.opening import OpenedModel
from moe_offload.prompts import (
    encode_chat,
    encode_text,
    max_context,
    require_known_ids,
    require_template,
    room_for_answer,
)
from moe_offload.sampling import Sampling

_MAX_NEW_TOKENS = 256
# Tokens of the prompt that the decoder of the continuation sees before it.
_BEFORE = 6
_INTERRUPTED = 130


def complete(
    opened: OpenedModel,
    prompt: str,
    sampling: Sampling,
    *,
    chat: bool | None,
    as_json: bool,
    stats: bool = False,
    trace: Path | None = None,
) -> int:
    """`moe-offload generate`: one continuation. Returns the exit code.

    stats: say what ran where. trace: write a timeline there.
    """
    if trace is not None:
        require_writable(trace)
    tokenizer = opened.tokenizer
    if chat:
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids = encode_text(tokenizer, prompt)
    require_known_ids(ids, opened.config)
    context = max_context(opened.config)
    room_for_answer(len(ids), context, 1)  # before the weights are loaded
    if chat is None and tokenizer.chat_template and terminal.console().is_terminal and not as_json:
        terminal.note("the model continues this text as it is; for a question add --chat (--raw leaves out this note)")
    model, load_seconds = opened.load()
    engine: Any = model.offload
    with engine:
        config = sampling.apply(model.generation_config)
        wanted = sampling.max_new_tokens or config.max_new_tokens or _MAX_NEW_TOKENS
        config.max_new_tokens = room_for_answer(len(ids), context, wanted)
        if sampling.max_new_tokens is not None and config.max_new_tokens < wanted:
            terminal.note(
                f"the context of {context} tokens leaves {config.max_new_tokens} beside the "
                f"prompt's {len(ids)}; "
                f"--max-new-tokens {wanted} is cut to that"
            )
        seed = _start_chance(sampling, config.do_sample)
        if trace is not None:
            if engine.device is None:
                raise OptionError("--trace is of a device's streams, and everything runs on the CPU: see --device")
            engine.record_timeline()
        generation = generate(
            model,
            tokenizer,
            ids,
            config,
            on_text=_ignore if as_json else terminal.write,
            before=() if chat else ids[-_BEFORE:],
            show_progress=opened.options.show_progress,
        )
        if as_json:
            result = _result(opened, model, generation, seed, load_seconds)
            if stats:
                found = engine.stats()
                result["device_stats"] = None if found is None else found.to_dict()
            terminal.write(json.dumps(result, ensure_ascii=False, indent=2) + "\n")
        else:
            if generation.text and not generation.text.endswith("\n"):
                terminal.write("\n")
            terminal.figures(generation.describe())
            if stats:
                _show_stats(engine)
        if trace is not None:
            _write_trace(engine, trace)
    return _INTERRUPTED if generation.finish_reason == "interrupted" else 0


def _show_stats(engine: Any) -> None:
    found = engine.stats()
    if found is None:
        terminal.note("everything ran on the CPU: there is nothing to split (see --device)")
        return
    from moe_offload.device_stats import stats_table

    for part in stats_table(found):
        terminal.console().print(part, style="dim")


def _write_trace(engine: Any, path: Path) -> None:
    if engine.device is None:
        terminal.note(f"{path} was not written: the device was lost, and its timeline with it")
        return
    try:
        count = engine.write_timeline(path)
    except OSError as error:
        raise OptionError(f"cannot write {path}: {error.strerror or error}") from error
    terminal.note(f"{count} events in {path}: open it at ui.perfetto.dev or chrome://tracing")


def require_writable(path: Path) -> None:
    """Raise OptionError where a file cannot be made, before a model is loaded."""
    if path.is_dir():
        raise OptionError(f"--trace {path} is a folder: give the name of a file")
    if not os.access(path.absolute().parent, os.W_OK):
        raise OptionError(f"--trace {path}: its folder does not exist or cannot be written to")


def converse(opened: OpenedModel, sampling: Sampling, *, system: str, as_json: bool) -> int:
    """`moe-offload chat`: turns until the user leaves. Returns the exit code."""
    require_template(opened.tokenizer)
    model, load_seconds = opened.load()
    engine: Any = model.offload
    with engine:
        conversation = Conversation(
            model,
            opened.tokenizer,
            sampling,
            system=system,
            show_progress=opened.options.show_progress,
        )
        seed = _start_chance(sampling, sampling.apply(model.generation_config).do_sample)

        def report(generation: Generation) -> None:
            if as_json:
                result = _result(opened, model, generation, seed, load_seconds)
                terminal.write(json.dumps(result, ensure_ascii=False) + "\n")
            else:
                terminal.figures(generation.describe())

        terminal_chat.hold(conversation, on_answer=report, echo=not as_json)
    return 0


def _start_chance(sampling: Sampling, chance: bool | None) -> int | None:
    """Seed torch; returns the seed, None where nothing is left to chance."""
    if not chance:
        return None
    seed = secrets.randbelow(2**31) if sampling.seed is None else sampling.seed
    torch.manual_seed(seed)
    return seed


def _result(
    opened: OpenedModel,
    model: PreTrainedModel,
    generation: Generation,
    seed: int | None,
    load_seconds: float,
) -> dict[str, Any]:
    """An answer as the object that --json prints."""
    engine: Any = model.offload
    return {
        "model": opened.options.name,
        "prompt_tokens": generation.prompt_tokens,
        "new_tokens": len(generation.new_ids),
        "text": generation.text,
        "finish_reason": generation.finish_reason,
        "seed": seed,
        "ttft_s": round(generation.prefill.seconds, 4),
        "prefill_tokens_per_s": round(generation.prefill.tokens_per_second, 2),
        "decode_tokens_per_s": round(generation.decode.tokens_per_second, 2),
        "expert_gb_per_s": round(generation.experts.gigabytes_per_second, 3),
        "expert_bytes_read": generation.experts.bytes_read,
        "load_s": round(load_seconds, 3),
        "threads": engine.threads,
        "weights": engine.weights,
        "device": "cpu" if engine.device is None else engine.device.accelerator.name,
    }


def _ignore(piece: str) -> None:
    pass
