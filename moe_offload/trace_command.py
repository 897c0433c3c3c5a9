"""`moe-offload trace`: what a model's routers choose for the text in a file, as a file for predictors."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_offload import terminal
from moe_offload.memory import format_bytes
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import MoeOffloadError, OptionError
from moe_offload.opening import OpenedModel
from moe_offload.pack_key import content_key
from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.trace import SPLITS, read_trace
from moe_offload.progress import BYTES, Activity
from moe_offload.prompt_file import PromptFile, read_sequences
from moe_offload.tracing import TraceResult, trace_model


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
    wanted = PromptFile(wishes.prompts, wishes.sequence_tokens, wishes.new_tokens, wishes.max_tokens)
    sequences = read_sequences(opened, wanted)
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
