"""Running a model to write down what its routers choose, and what could have been known before they did.

Sequences of one length run together. Hooks on the experts modules and on the embedding see what a layer's experts get;
scores, look-ahead and projections are computed at once, so that hidden states are never kept. The projections are
fitted first, on tokens of some training sequences.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from moe_offload.models.routers import Routers, as_floats, experts_call, normalised, read_routers
from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.projection import Projection, fit, quantise
from moe_offload.predictor.tensor_file import map_tensors
from moe_offload.predictor.trace import FORMAT, TEST, TRAIN, Trace, TraceInfo, read_trace, split_of
from moe_offload.predictor.trace_writer import SETTINGS, TracedSequence, TraceWriter

_BATCH_TOKENS = 2048  # of prompts that run together
_BATCH = 32
_SAMPLE = 2048  # tokens that projections are fitted on
_SAMPLE_BYTES = 256 << 20
_SAMPLE_SEQUENCES = 32

Ids = NDArray[np.int64]
Progress = Callable[[str, int, int], None]  # what, tokens done, tokens in all


@dataclass(frozen=True, slots=True)
class TraceResult:
    """What `trace_model` did."""

    path: Path
    info: TraceInfo
    sequences: int
    tokens: int
    resumed: int  # sequences that an earlier run had traced
    was_there: bool  # nothing was to be done


def trace_model(
    model: PreTrainedModel,
    sequences: Sequence[Sequence[int] | Ids],
    path: Path,
    *,
    fingerprint: str,
    new_tokens: int = 0,
    projected: int = 128,
    like: Trace | None = None,
    note: str = "",
    progress: Progress | None = None,
) -> TraceResult:
    """Trace a model that `moe_offload.load` made (on the CPU) on sequences of token ids.

    fingerprint: `pack_key.content_key` of its checkpoint. new_tokens: how many are generated behind each sequence,
    greedily, and traced as well. like: a trace of the same model whose projections are used; all sequences are for the
    test then. An interrupted run goes on when it is called again with the same arguments.

    Raises TraceError when the trace cannot be made or written, UnsupportedModelError when the model's routers cannot be
    followed.
    """
    ids = [np.asarray(each, np.int64) for each in sequences]
    if not ids or not all(each.size for each in ids):
        raise TraceError("there is nothing to trace: give at least one sequence, and none without a token")
    if like is not None:
        _require_alike(like.info, fingerprint)
        projected = like.info.projected
    engine: Any = model.offload
    layer = engine.spec.layers[0]
    info = TraceInfo(
        FORMAT, fingerprint, engine.spec.model_type, len(engine.spec.layers), layer.num_experts, layer.top_k,
        layer.hidden_size, projected, note=note,
    )  # fmt: skip
    settings = _digest(info, ids, new_tokens, like, (engine.weights, engine.dense))
    if path.exists():
        return _already_there(path, settings)
    routers = read_routers(model)
    writer = TraceWriter(path, info, settings)
    splits = [TEST if like is not None else split_of(each) for each in ids]
    with torch.inference_mode():
        if writer.projections is None:
            try:
                writer.set_projections(_projections(model, routers, ids, splits, info, like, progress))
            except TraceError:
                writer.discard()
                raise
        resumed = writer.sequences
        done, expected = 0, sum(len(each) + new_tokens for each in ids[resumed:])
        recorder = Recorder(routers, writer.projections or ())
        try:
            with recorder.watching(model):
                for batch in _batches(ids, resumed):
                    recorder.clear()
                    ends = _run(model, np.stack([ids[each] for each in batch]), new_tokens)
                    recorded = recorder.recorded(len(batch))
                    for row, (number, end) in enumerate(zip(batch, ends, strict=True)):
                        arrays = {name: array[row][:, :end] for name, array in recorded.items()}
                        writer.append(TracedSequence(len(ids[number]), splits[number], **arrays))
                        done += len(ids[number]) + new_tokens
                    if progress is not None:
                        progress("tracing", done, expected)
        except KeyboardInterrupt:
            writer.flush()
            raise
    writer.finish(None if progress is None else lambda at, total: progress("writing", at, total))
    trace = read_trace(path, fingerprint)
    return TraceResult(path, info, trace.sequences, trace.experts.shape[1], resumed, False)


class Recorder:
    """Computes what a trace keeps while a model runs."""

    def __init__(self, routers: Routers, projections: Sequence[Projection]) -> None:
        self._routers = routers
        self._projections = projections
        self._steps: list[_Step] = []

    def clear(self) -> None:
        """Forget what was recorded."""
        self._steps = []

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """While this is entered, what runs through the model is recorded."""
        with watch(model, self._on_embedding, self._on_experts):
            yield

    def recorded(self, rows: int) -> dict[str, NDArray[Any]]:
        """By a trace's names: [rows, L, T, ...] of the sequences that ran together."""
        layers = len(self._routers.layers)
        found: dict[str, NDArray[Any]] = {}
        for name in _Step._fields:
            steps = []
            for step in self._steps:
                array = np.stack(getattr(step, name))
                if len(array) != layers or array.shape[1] % rows:
                    raise TraceError("the model did not call each of its layers' experts once: it cannot be traced")
                steps.append(array.reshape(layers, rows, -1, *array.shape[2:]))
            found[name] = np.moveaxis(np.concatenate(steps, axis=2), 1, 0)
        return found

    def _on_embedding(self, embedded: NDArray[np.float32]) -> None:
        self._steps.append(_Step([], [], [], [], [], []))
        self._see(0, normalised(embedded))

    def _on_experts(
        self, layer: int, hidden: NDArray[np.float32], index: NDArray[np.int64], weights: NDArray[np.float32]
    ) -> None:
        step = self._steps[-1]
        if layer != len(step.experts) or index.min() < 0 or index.max() >= len(self._routers.layers[0].weight):
            raise TraceError(f"layer {layer} chose experts that it does not have, or ran twice: it cannot be traced")
        step.experts.append(index.astype(np.uint16))
        step.weights.append(_half(weights))
        step.scores.append(_half(self._routers.layers[layer].scores(hidden)))
        if layer + 1 < len(self._routers.layers):
            self._see(layer + 1, hidden)

    def _see(self, source: int, state: NDArray[np.float32]) -> None:
        step = self._steps[-1]
        step.look.append(_half(self._routers.sources[source].look(state)))
        rows, scale = quantise(self._projections[source](state))
        step.hidden.append(rows)
        step.hidden_scale.append(scale)


class _Step(NamedTuple):
    """One forward, a list entry for each layer."""

    experts: list[NDArray[Any]]
    weights: list[NDArray[np.float16]]
    scores: list[NDArray[np.float16]]
    look: list[NDArray[np.float16]]
    hidden: list[NDArray[np.int8]]
    hidden_scale: list[NDArray[np.float16]]


@contextmanager
def watch(
    model: PreTrainedModel,
    on_embedding: Callable[[NDArray[np.float32]], None],
    on_experts: Callable[[int, NDArray[np.float32], NDArray[np.int64], NDArray[np.float32]], None],
) -> Iterator[None]:
    """Call these with every forward's embeddings [T, H], and each layer's experts input, indices and weights."""

    def embedded(_: nn.Module, __: Any, output: torch.Tensor) -> None:
        on_embedding(as_floats(output).reshape(-1, output.shape[-1]))

    def hook(layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def called(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, index, weights = experts_call(args, kwargs)
            numbers = index.cpu().numpy().astype(np.int64)
            on_experts(layer, as_floats(hidden), numbers, as_floats(weights))

        return called

    engine: Any = model.offload
    handles = [model.get_input_embeddings().register_forward_hook(embedded)]
    for number, layer in enumerate(engine.spec.layers):
        module = model.get_submodule(layer.path)
        handles.append(module.register_forward_pre_hook(hook(number), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run(model: PreTrainedModel, ids: Ids, new_tokens: int) -> list[int]:
    """Run prompts [B, T] and generate; returns how many tokens of each row ran, those behind an end left out."""
    prompts = torch.from_numpy(ids)
    rows, length = ids.shape
    if not new_tokens:
        model.base_model(input_ids=prompts, use_cache=False)
        return [length] * rows
    ends = getattr(model.generation_config, "eos_token_id", None)
    config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens + 1, eos_token_id=ends, pad_token_id=0
    )  # the last new token is chosen, and does not run
    output: Any = model.generate(prompts, attention_mask=torch.ones_like(prompts), generation_config=config)
    ending = np.isin(output[:, length:].numpy(), [] if ends is None else ends)
    ran = np.where(ending.any(axis=1), ending.argmax(axis=1), new_tokens)
    return [length + min(int(each), new_tokens) for each in ran]


def _projections(
    model: PreTrainedModel,
    routers: Routers,
    ids: Sequence[Ids],
    splits: Sequence[int],
    info: TraceInfo,
    like: Trace | None,
    progress: Progress | None,
) -> tuple[Projection, ...]:
    if like is not None:
        return tuple(map(Projection, like.projection, like.offset, like.variance))
    training = [each for each, split in zip(ids, splits, strict=True) if split == TRAIN]
    if not training:
        raise TraceError(
            f"none of {len(ids)} sequences is for training (4 of 5 are, by chance): give more text, or another "
            "trace's projections with --like"
        )
    most = min(_SAMPLE, max(_SAMPLE_BYTES // (2 * info.layers * info.hidden_size), 2 * info.projected))
    spread = np.unique(np.linspace(0, len(training) - 1, min(len(training), _SAMPLE_SEQUENCES)).astype(int))
    each = math.ceil(most / len(spread))
    rows: list[list[NDArray[np.float16]]] = [[] for _ in routers.sources]

    def keep(source: int, state: NDArray[np.float32]) -> None:
        if source < len(rows):
            picked = np.unique(np.linspace(0, len(state) - 1, min(each, len(state))).astype(int))
            rows[source].append(_half(state[picked]))

    with watch(model, lambda x: keep(0, normalised(x)), lambda layer, x, _, __: keep(layer + 1, x)):
        for done, number in enumerate(spread):
            model.base_model(input_ids=torch.from_numpy(training[number][None]), use_cache=False)
            if progress is not None:
                progress("sampling", done + 1, len(spread))
    return tuple(fit(np.concatenate(source), info.projected) for source in rows)


def _batches(ids: Sequence[Ids], first: int) -> Iterator[list[int]]:
    """Numbers of neighbouring sequences of one length, not too many tokens together."""
    batch: list[int] = []
    for number in range(first, len(ids)):
        length = len(ids[number])
        if batch and (
            length != len(ids[batch[0]]) or len(batch) == _BATCH or (len(batch) + 1) * length > _BATCH_TOKENS
        ):
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


def _half(values: NDArray[np.float32]) -> NDArray[np.float16]:
    return np.clip(values, -65504, 65504).astype(np.float16)


def _digest(info: TraceInfo, ids: Sequence[Ids], new_tokens: int, like: Trace | None, formats: tuple[str, str]) -> str:
    """Everything that decides what is in a trace."""
    digest = hashlib.sha256(json.dumps([repr(info), new_tokens, formats]).encode())
    for each in ids:
        digest.update(len(each).to_bytes(8, "little") + each.tobytes())
    if like is not None:
        digest.update(like.projection.tobytes() + like.offset.tobytes())
    return digest.hexdigest()


def _require_alike(info: TraceInfo, fingerprint: str) -> None:
    if info.model != fingerprint:
        raise TraceError(
            f"the trace whose projections are to be used is of another model ({info.model_type}, {info.model[:16]})"
        )


def _already_there(path: Path, settings: str) -> TraceResult:
    try:
        same = map_tensors(path)[0].get(SETTINGS) == settings
    except (OSError, ValueError):
        same = False
    if not same:
        raise TraceError(f"{path} is there already, and not what this would make: remove it, or name another with -o")
    trace = read_trace(path)
    return TraceResult(path, trace.info, trace.sequences, trace.experts.shape[1], 0, True)
