"""`moe-offload verify`: whether what runs here computes what transformers does, in figures for eyes or machines."""

import enum
import gc
import hashlib
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from moe_offload import terminal
from moe_offload.layer_stream import LayerStream
from moe_offload.models.errors import OptionError
from moe_offload.opening import DTYPES, OpenedModel
from moe_offload.progress import Activity
from moe_offload.prompt_file import PromptFile, read_sequences
from moe_offload.prompts import max_context
from moe_offload.verify_metrics import Agreement
from moe_offload.verify_model import Verified, compare
from moe_offload.verify_reference import load_reference
from moe_offload.verify_report import Ran, Report, write_json, write_table

# A module of Python's own, mostly prose, that every installation has and that the demo model was not trained on.
_TEXT_MODULE = enum
_SEQUENCE_TOKENS = 512  # where the model's context holds as many
_DISAGREES = 1


@dataclass(frozen=True, slots=True)
class VerifyWishes:
    """What to compare on, and what is too much of a difference. Raises OptionError for values out of bounds."""

    prompts: Path | None = None
    tokens: int = 2048
    sequence_tokens: int | None = None
    decode_tokens: int = 16
    reference_dtype: str = "auto"
    max_perplexity_change: float | None = None  # percent
    min_top1: float | None = None  # percent

    def __post_init__(self) -> None:
        least = {"tokens": 2, "sequence-tokens": 2, "decode-tokens": 0}
        for name, bound in least.items():
            value = getattr(self, name.replace("-", "_"))
            if value is not None and value < bound:
                raise OptionError(f"--{name} {value} is out of bounds: it must be at least {bound}")
        if self.sequence_tokens is not None and self.sequence_tokens > self.tokens:
            raise OptionError(
                f"--sequence-tokens {self.sequence_tokens} is more than --tokens {self.tokens} allows: no sequence fits"
            )
        if self.reference_dtype not in DTYPES:
            raise OptionError(f"--reference-dtype {self.reference_dtype} is not one of {', '.join(DTYPES)}")
        change, top1 = self.max_perplexity_change, self.min_top1
        if change is not None and not 0 <= change < math.inf:
            raise OptionError(f"--max-perplexity-change {change:g} is out of bounds: give percent, 0 or more")
        if top1 is not None and not 0 <= top1 <= 100:
            raise OptionError(f"--min-top1 {top1:g} is out of bounds: give percent, 0 to 100")


def verify(opened: OpenedModel, wishes: VerifyWishes, *, as_json: bool) -> int:
    """Compare and print. Returns 1 where the difference is too large, else 0.

    Raises OptionError for text that cannot be used, and what loading raises.
    """
    started = time.perf_counter()
    options = opened.options
    sequences, text = _read_text(opened, wishes)
    # Whatever speaks against loading is told now, not after the reference has run for an hour.
    model, _ = opened.load()
    engine: Any = model.offload
    ran = Ran(
        engine.weights, engine.dense, options.activations, _name(model.dtype),
        "cpu" if engine.device is None else engine.device.accelerator.name,
    )  # fmt: skip
    engine.close()
    del model, engine
    gc.collect()  # a model and its engine hold each other
    with Activity(f"loading the reference of {options.name}", enabled=options.show_progress) as activity:
        with _no_bars():
            reference = load_reference(
                opened.folder, dtype=DTYPES[wishes.reference_dtype], attn_implementation=options.attn_implementation,
                memory_limit=options.memory_limit,
            )  # fmt: skip
        try:
            with LayerStream(reference) as stream:
                what = f"running the reference of {options.name}"
                stream.run(sequences, lambda done, total: activity.update(what, done, total, "layers"))
                activity.end()
                found = _compare(opened, stream, sequences, wishes)
        finally:
            reference.close()
    complaints = _complaints(found.all, wishes)
    report = Report(
        options.name, ran, _name(reference.dtype), text, _digest(sequences), len(sequences), found, complaints,
        round(time.perf_counter() - started, 3),
    )  # fmt: skip
    if as_json:
        write_json(report)
    else:
        write_table(report)
    for each in complaints:
        terminal.error(each)
    return _DISAGREES if complaints else 0


@contextmanager
def _no_bars() -> Iterator[None]:
    """transformers' own progress bars would be drawn into our line."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _read_text(opened: OpenedModel, wishes: VerifyWishes) -> tuple[list[torch.Tensor], str]:
    """Sequences [1, T], and what they are of."""
    path, name = wishes.prompts, str(wishes.prompts)
    if path is None:
        source = _TEXT_MODULE.__file__
        if source is None or not Path(source).is_file():
            raise OptionError("this Python comes without its sources, which are the default text: give --prompts FILE")
        path, name = Path(source), f"{Path(source).name} of Python {platform.python_version()}"
    size = wishes.sequence_tokens or min(
        _SEQUENCE_TOKENS, max_context(opened.config) or _SEQUENCE_TOKENS, wishes.tokens
    )
    wanted = PromptFile(path, size, max_tokens=wishes.tokens)
    sequences = [torch.tensor([ids]) for ids in read_sequences(opened, wanted) if len(ids) > 1]
    if not sequences:
        raise OptionError(f"{path} has no prompt of two tokens: there is no next token to predict")
    return sequences, name


def _compare(
    opened: OpenedModel, stream: LayerStream, sequences: Sequence[torch.Tensor], wishes: VerifyWishes
) -> Verified:
    model, _ = opened.load()
    engine: Any = model.offload
    try:
        with Activity(f"comparing {opened.options.name}", enabled=opened.options.show_progress) as activity:
            return compare(
                stream.logits, model, sequences, decode_tokens=wishes.decode_tokens,
                progress=lambda done, total: activity.update(f"comparing {opened.options.name}", done, total, "tokens"),
            )  # fmt: skip
    finally:
        engine.close()


def _complaints(found: Agreement, wishes: VerifyWishes) -> list[str]:
    """What is worse than allowed, a line each."""
    if not found.is_finite:
        return ["the model's logits are not all finite numbers: it computes something else than the reference"]
    complaints = []
    if wishes.max_perplexity_change is not None and not found.change <= wishes.max_perplexity_change:
        complaints.append(
            f"perplexity rises by {found.change:.3g} %, more than --max-perplexity-change "
            f"{wishes.max_perplexity_change:g}"
        )
    if wishes.min_top1 is not None and not found.top1 >= wishes.min_top1:
        complaints.append(
            f"the most probable token is the reference's at {found.top1:.4g} % of the positions, less than --min-top1 "
            f"{wishes.min_top1:g}"
        )
    return complaints


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(sequences: Sequence[torch.Tensor]) -> str:
    """Of the token ids: figures of two runs compare where it is the same."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(ids.numpy().tobytes() + b"|")
    return digest.hexdigest()[:16]
