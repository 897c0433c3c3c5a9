"""`moe-offload train-predictor`: a model's predictor from text, or from a trace that is there already."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from moe_offload import terminal
from moe_offload.loading import read_config
from moe_offload.memory import format_bytes
from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import MoeOffloadError, OptionError
from moe_offload.models.spec import MoeSpec
from moe_offload.opening import OpenedModel
from moe_offload.pack_key import content_key
from moe_offload.predictor.errors import PredictorError, TraceError
from moe_offload.predictor.network_file import FORMAT, NetworkInfo, write_networks
from moe_offload.predictor.trace import DISTANCES, TRAIN, VALIDATION, Trace, read_trace
from moe_offload.predictor.training import Settings, Trained, train_source
from moe_offload.predictor_folder import predictor_path
from moe_offload.progress import Activity
from moe_offload.trace_command import TraceWishes, make_trace


@dataclasses.dataclass(frozen=True, slots=True)
class TrainWishes:
    """What to learn from, and where to keep it. Raises OptionError for values out of bounds."""

    prompts: Path | None
    trace: Path | None
    output: Path | None
    passes: int = Settings().passes
    max_tokens: int | None = None
    sequence_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.prompts is None) == (self.trace is None):
            raise OptionError(
                "give either --prompts FILE, text to trace the model on and to learn from, or --trace FILE, which "
                "moe-offload trace has made"
            )
        if self.passes < 1:
            raise OptionError(f"--passes {self.passes} is out of bounds: it must be at least 1")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise OptionError(f"--max-tokens {self.max_tokens} is out of bounds: it must be at least 1")
        if self.seed < 0:
            raise OptionError(f"--seed {self.seed} is out of bounds: it must be at least 0")
        if self.output is not None and self.output.is_dir():
            raise OptionError(f"-o {self.output} is a folder: name a file")


def identify(folder: Path) -> tuple[str, str]:
    """Model type and fingerprint of the checkpoint in a folder. Raises as `load` does for what is wrong with it."""
    spec = MoeSpec.from_hf(read_config(folder))
    return spec.model_type, content_key(spec, Checkpoint.open(folder))


def train_predictor(opened: OpenedModel, wishes: TrainWishes, *, as_json: bool) -> int:
    """Train a predictor and keep it. Returns the exit code.

    Raises OptionError for prompts that cannot be used, MoeOffloadError when the trace is of another model or too small,
    or there is no place for the trace or the predictor.
    """
    started = time.perf_counter()
    model_type, fingerprint = identify(opened.folder)
    output = wishes.output or predictor_path(model_type, fingerprint)
    if wishes.trace is not None:
        return _train(opened, wishes, wishes.trace, fingerprint, output, started, as_json)
    assert wishes.prompts is not None
    beside = output.with_name(f"{output.name}.trace")
    try:
        beside.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoeOffloadError(f"cannot make the folder {beside.parent}: {error.strerror or error}; give -o") from error
    wanted = TraceWishes(wishes.prompts, beside, sequence_tokens=wishes.sequence_tokens, max_tokens=wishes.max_tokens)
    try:
        make_trace(opened, wanted)
    except MoeOffloadError:
        if not beside.exists():
            raise
        beside.unlink()  # one that an interrupted run left, of other text
        make_trace(opened, wanted)
    finished = True
    try:
        return _train(opened, wishes, beside, fingerprint, output, started, as_json)
    except KeyboardInterrupt:
        terminal.note("the trace is kept: the same command goes on with it")
        finished = False
        raise
    finally:
        if finished:
            beside.unlink(missing_ok=True)


def _train(
    opened: OpenedModel, wishes: TrainWishes, path: Path, fingerprint: str, output: Path, started: float, as_json: bool
) -> int:
    settings = Settings(passes=wishes.passes, seed=wishes.seed)
    options = opened.options
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found: list[Trained] = []
    try:
        trace = read_trace(path, fingerprint)
        with Activity(f"training the predictor of {options.name}", enabled=options.show_progress) as activity:
            for source in range(trace.info.layers):
                found.append(
                    train_source(
                        trace, source, settings, lambda what, done, total: activity.update(what, done, total, "rows")
                    )
                )
        info = _info(trace, found)
        write_networks(output, info, [each.network for each in found])
    except KeyboardInterrupt:
        terminal.note("interrupted: no predictor was written")
        raise
    except (TraceError, PredictorError) as error:
        raise MoeOffloadError(str(error)) from error
    _report(output, info, found, trace, time.perf_counter() - started, as_json)
    return 0


def _info(trace: Trace, found: list[Trained]) -> NetworkInfo:
    names = {field.name for field in dataclasses.fields(NetworkInfo)}
    shared = {name: value for name, value in dataclasses.asdict(trace.info).items() if name in names}
    tokens = len(trace.tokens(trace.in_split(TRAIN)))
    recall = dict(zip(("look_ahead", "learned"), _mean_recall(found), strict=True))
    return NetworkInfo(**{**shared, "format": FORMAT, "tokens": tokens, "recall": recall})


def _mean_recall(found: list[Trained]) -> list[list[float]]:
    """[2][D] mean over layers; distances that no layer has count as 0."""
    recall = np.stack([each.recall for each in found])
    counts = np.maximum(np.isfinite(recall).sum(axis=0), 1)
    mean: list[list[float]] = np.round(np.nansum(recall, axis=0) / counts, 4).tolist()
    return mean


def _report(path: Path, info: NetworkInfo, found: list[Trained], trace: Trace, seconds: float, as_json: bool) -> None:
    size = path.stat().st_size
    if as_json:
        said: dict[str, Any] = {
            "predictor": str(path), "bytes": size, "model": info.model, "tokens": info.tokens, "recall": info.recall,
            "passes": [each.passes for each in found], "seconds": round(seconds, 3),
        }  # fmt: skip
        terminal.write(json.dumps(said, ensure_ascii=False, indent=2) + "\n")
        return
    terminal.write(f"{path}\n")
    before, after = info.recall["look_ahead"], info.recall["learned"]
    table = Table("layers ahead", *map(str, range(1, DISTANCES + 1)), title="recall on validation text")
    table.add_row("gate look-ahead", *(f"{value:.1%}" for value in before))
    table.add_row("this predictor", *(f"{value:.1%}" for value in after))
    terminal.console().print(table)
    validated = len(trace.tokens(trace.in_split(VALIDATION)))
    terminal.figures(
        f"{info.tokens} tokens to learn from, {validated} to validate, {format_bytes(size)}, in {seconds:.0f} s"
    )
