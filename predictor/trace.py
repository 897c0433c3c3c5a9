"""Routing traces: what a model's routers chose, token by token, and what a predictor could have known before.

A trace is one safetensors file. Letters: S sequences, N tokens of all sequences one behind the other, L layers with
experts, E experts, K experts per token, H hidden, P projected hidden, D = 3 distances. *Source* s is what is known
before layer s runs: for s >= 1 the hidden states that went into layer s - 1's experts (behind the norm), for s = 0 the
token's embedding. From source s one looks D layers ahead, to layers s, s + 1, s + 2: distances 1, 2, 3.

    starts            int64 [S + 1]       first token of each sequence, and N
    prompt_tokens     int64 [S]           of each sequence, how many were given (prefill); the others were generated
    split             uint8 [S]           0 training, 1 validation, 2 test: by a hash of the sequence's token ids
    experts           uint8 or uint16 [L, N, K]   what the router of each layer chose
    weights           float16 [L, N, K]   with which weights
    scores            float16 [L, N, E]   what the router chose by: the K largest, before groups
    look              float16 [L, N, D, E]    source s's scores from the routers of layers s, s + 1, s + 2 (0 beyond L)
    hidden            int8 [L, N, P]      source s: (projection[s] @ x - offset[s]) / scale
    hidden_scale      float16 [L, N]      the scale of each row
    projection        float32 [L, P, H]   principal directions of source s, fitted on training sequences only
    offset            float32 [L, P]      projection of the mean
    variance          float32 [L, P]      along each direction, of what they were fitted on

Layer-major, so that one source or layer is read in one stretch. Metadata "moe_offload_trace" holds `TraceInfo` as JSON.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.tensor_file import DTYPES, map_tensors

FORMAT = 1
KEY = "moe_offload_trace"
DISTANCES = 3  # layers that are looked ahead
# What a router's scores are of its logits: themselves, or SHARPNESS times their sigmoid or softmax plus a bias, which
# makes differences of bounded scores as large as those of logits.
Select = Literal["linear", "sigmoid", "softmax"]
SHARPNESS = 8.0
TRAIN, VALIDATION, TEST = 0, 1, 2
SPLITS = ("train", "validation", "test")
_TYPES = {dtype.str: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TraceInfo:
    """What a trace is of. `model`: 64 hexadecimal digits that tell the stored weights from all others, or "synthetic".

    note: where the text came from, for whoever reads it.
    """

    format: int
    model: str
    model_type: str
    layers: int
    experts: int
    top_k: int
    hidden_size: int
    projected: int
    distances: int = DISTANCES
    note: str = ""

    @property
    def synthetic(self) -> bool:
        """Whether a generator made it."""
        return self.model == "synthetic"


class Trace(NamedTuple):
    """A trace in memory, or mapped; arrays as described above. `sequences` picks some, `tokens` lists their tokens."""

    info: TraceInfo
    starts: NDArray[np.int64]
    prompt_tokens: NDArray[np.int64]
    split: NDArray[np.uint8]
    experts: NDArray[Any]
    weights: NDArray[np.float16]
    scores: NDArray[np.float16]
    look: NDArray[np.float16]
    hidden: NDArray[np.int8]
    hidden_scale: NDArray[np.float16]
    projection: NDArray[np.float32]
    offset: NDArray[np.float32]
    variance: NDArray[np.float32]

    @property
    def sequences(self) -> int:
        """How many."""
        return len(self.split)

    def in_split(self, *splits: int) -> NDArray[np.int64]:
        """The sequences of these splits."""
        return np.flatnonzero(np.isin(self.split, splits))

    def tokens(self, sequences: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Token numbers of sequences, one sequence behind the other."""
        parts = [np.arange(self.starts[each], self.starts[each + 1]) for each in sequences]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def sequence_of(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The sequence of each token."""
        return np.asarray(np.searchsorted(self.starts, tokens, side="right") - 1)

    def before(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The token before each in its sequence; -1 for the first."""
        return np.where(np.isin(tokens, self.starts), -1, tokens - 1)

    def generated(self, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which tokens the model generated itself, one at a time; the others came with a prompt."""
        sequence = self.sequence_of(tokens)
        return np.asarray(tokens - self.starts[sequence] >= self.prompt_tokens[sequence])

    def chosen(self, layer: int, tokens: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n, E] which experts each token was routed to."""
        found = np.zeros((len(tokens), self.info.experts), np.bool_)
        np.put_along_axis(found, self.experts[layer, tokens].astype(np.int64), True, axis=1)
        return found

    def state(self, source: int, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        """[n, P] projected hidden states of a source."""
        scale = self.hidden_scale[source, tokens].astype(np.float32)
        return np.asarray(self.hidden[source, tokens].astype(np.float32) * scale[:, None])


def shapes(info: TraceInfo, sequences: int, tokens: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """By name: safetensors type and shape of every tensor of a trace."""
    layers, experts, projected = info.layers, info.experts, info.projected
    index = "U8" if experts <= 256 else "U16"
    return {
        "starts": ("I64", (sequences + 1,)),
        "prompt_tokens": ("I64", (sequences,)),
        "split": ("U8", (sequences,)),
        "experts": (index, (layers, tokens, info.top_k)),
        "weights": ("F16", (layers, tokens, info.top_k)),
        "scores": ("F16", (layers, tokens, experts)),
        "look": ("F16", (layers, tokens, info.distances, experts)),
        "hidden": ("I8", (layers, tokens, projected)),
        "hidden_scale": ("F16", (layers, tokens)),
        "projection": ("F32", (layers, projected, info.hidden_size)),
        "offset": ("F32", (layers, projected)),
        "variance": ("F32", (layers, projected)),
    }


def split_of(token_ids: Sequence[int] | NDArray[Any]) -> int:
    """Where a sequence belongs: of all sequences 80 % are for training, 10 % for validation, 10 % for the test.

    The same text goes to the same place in every trace.
    """
    digest = hashlib.sha256(np.asarray(token_ids, "<i8").tobytes()).digest()
    tenth = int.from_bytes(digest[:8], "little") % 10
    return TRAIN if tenth < 8 else VALIDATION if tenth == 8 else TEST


def read_trace(path: Path, model: str | None = None) -> Trace:
    """Open a trace; its large arrays are mapped, not read. model: the fingerprint it has to have.

    Raises TraceError when it is no trace, damaged, of another version or of another model.
    """
    try:
        metadata, arrays = map_tensors(path)
        info = _info(path, metadata)
    except FileNotFoundError as error:
        raise TraceError(f"there is no trace {path}: moe-offload trace makes one") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{path} is no trace, or a damaged one ({error}): make it again") from error
    found = {name: (_TYPES[array.dtype.str], array.shape) for name, array in arrays.items()}
    sizes = arrays.get("split"), arrays.get("hidden_scale")
    if any(size is None or not size.ndim for size in sizes):
        raise TraceError(f"{path} lacks tensors of a trace: make it again")
    wanted = shapes(info, len(sizes[0]), sizes[1].shape[-1])  # type: ignore[arg-type, union-attr]
    if found != wanted:
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        raise TraceError(f"{path} does not hold what its heading says ({', '.join(wrong)}): make it again")
    trace = Trace(info, **arrays)
    _check(path, trace)
    if model is not None and info.model != model:
        raise TraceError(f"{path} is a trace of another model ({info.model_type}, {info.model[:16]}), not of this one")
    return trace


def _info(path: Path, metadata: dict[str, str]) -> TraceInfo:
    if KEY not in metadata:
        raise TraceError(f"{path} is no trace: its heading does not say so")
    values = json.loads(metadata[KEY])
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        said = values.get("format") if isinstance(values, dict) else values
        raise TraceError(f"{path} has format {str(said)[:40]}, this version reads {FORMAT}: make it again")
    info = TraceInfo(**values)
    counts = (info.layers, info.experts, info.top_k, info.hidden_size, info.projected)
    sound = all(type(count) is int and count >= 1 for count in counts) and info.top_k <= info.experts <= 65536
    texts = (info.model, info.model_type, info.note)
    if not sound or info.distances != DISTANCES or not all(isinstance(text, str) for text in texts):
        raise TraceError(f"{path} has an impossible heading: make it again")
    return info


def _check(path: Path, trace: Trace) -> None:
    starts, tokens = trace.starts, trace.experts.shape[1]
    lengths = np.diff(starts)
    sound = len(lengths) and starts[0] == 0 and starts[-1] == tokens and (lengths > 0).all()
    if not sound or (trace.prompt_tokens < 1).any() or (trace.prompt_tokens > lengths).any() or trace.split.max() > 2:
        raise TraceError(f"{path} has sequences that overlap or are empty: make it again")
    fitted = (trace.projection, trace.offset, trace.variance)
    if not all(np.isfinite(each).all() for each in fitted) or trace.variance.min() < 0:
        raise TraceError(f"{path} has projections that are no numbers: make it again")
    if tokens and int(trace.experts.max()) >= trace.info.experts:
        raise TraceError(f"{path} names expert {trace.experts.max()} of {trace.info.experts}: make it again")


def heading(info: TraceInfo) -> dict[str, str]:
    """The metadata of a trace's file."""
    return {KEY: json.dumps(asdict(info))}
