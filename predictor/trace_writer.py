"""Traces written as they are made, in bounded memory, so that what was interrupted goes on where it stopped.

Sequences collect in *parts*, small files in the folder `NAME.parts` beside the trace, each written whole or not at all.
In its metadata a part bears the settings it was made with and its first sequence: a later run with the same settings
goes on after the last part of an unbroken row, one with others begins anew. At the end the parts are put together,
layer by layer, and removed.
"""

import logging
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe_offload.predictor.errors import TraceError
from moe_offload.predictor.projection import Projection
from moe_offload.predictor.tensor_file import DTYPES, Specs, Tensors, map_tensors, write_tensors
from moe_offload.predictor.trace import Trace, TraceInfo, heading, shapes

logger = logging.getLogger(__name__)

SETTINGS = "moe_offload_trace_settings"  # metadata: what a trace was made with, as a hash
_FIRST = "first_sequence"
_PART_BYTES = 48 << 20
_BY_LAYER = ("experts", "weights", "scores", "look", "hidden", "hidden_scale")
_OF_ALL = ("projection", "offset", "variance")

Progress = Callable[[int, int], None]  # bytes done, bytes in all


class TracedSequence(NamedTuple):
    """One sequence of T tokens, its arrays as those of a trace."""

    prompt_tokens: int
    split: int
    experts: NDArray[Any]  # [L, T, K]
    weights: NDArray[np.float16]
    scores: NDArray[np.float16]  # [L, T, E]
    look: NDArray[np.float16]  # [L, T, D, E]
    hidden: NDArray[np.int8]  # [L, T, P]
    hidden_scale: NDArray[np.float16]  # [L, T]

    @property
    def tokens(self) -> int:
        """How many."""
        return int(self.experts.shape[1])


class TraceWriter:
    """Writes the trace `path`. settings: a hash of everything that decides what is in it.

    `sequences` are in parts already: go on behind them. Raises TraceError when the folder cannot be written to.
    """

    def __init__(self, path: Path, info: TraceInfo, settings: str) -> None:
        self.path, self.info = path, info
        self.folder = path.with_name(f"{path.name}.parts")
        self._settings = settings
        self._waiting: list[TracedSequence] = []
        self._bytes = 0
        self._guarded(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        self._projections = self._read_projections()
        self._parts = self._find_parts() if self._projections is not None else []
        self._drop_others()

    @property
    def sequences(self) -> int:
        """Those in parts."""
        return sum(len(part["split"]) for part in self._parts)

    @property
    def tokens(self) -> int:
        """Those in parts."""
        return sum(part["hidden_scale"].shape[1] for part in self._parts)

    @property
    def projections(self) -> tuple[Projection, ...] | None:
        """Of each source; None where they have yet to be fitted."""
        return self._projections

    def set_projections(self, projections: tuple[Projection, ...]) -> None:
        """Keep the projections that all sequences are made with, before the first sequence."""
        arrays = dict(zip(_OF_ALL, map(np.stack, zip(*projections, strict=True)), strict=True))
        specs = {name: shape for name, shape in self._shapes(0, 0).items() if name in _OF_ALL}
        self._write(self.folder / "projection", specs, {}, lambda name, put: put(arrays[name]))
        self._projections = projections

    def append(self, sequence: TracedSequence) -> None:
        """The next sequence."""
        self._waiting.append(sequence)
        self._bytes += sum(getattr(sequence, name).nbytes for name in _BY_LAYER)
        if self._bytes >= _PART_BYTES:
            self.flush()

    def flush(self) -> None:
        """Put what waits into a part."""
        waiting = self._waiting
        if not waiting:
            return
        starts = np.cumsum([0, *(each.tokens for each in waiting)])
        specs = {
            name: each for name, each in self._shapes(len(waiting), int(starts[-1])).items() if name not in _OF_ALL
        }

        def fill(name: str, put: Callable[[Any], None]) -> None:
            if name == "starts":
                put(starts)
            elif name in _BY_LAYER:
                put(np.concatenate([getattr(each, name) for each in waiting], axis=1))
            else:
                put([getattr(each, name) for each in waiting])

        path = self._part_path(len(self._parts))
        self._write(path, specs, {_FIRST: str(self.sequences)}, fill)
        self._parts.append(map_tensors(path)[1])
        self._waiting, self._bytes = [], 0

    def finish(self, progress: Progress | None = None) -> None:
        """Put the parts together and remove them."""
        self.flush()
        if self._projections is None or not self._parts:
            raise TraceError(f"there is nothing to write into {self.path}: no sequence was traced")
        specs = self._shapes(self.sequences, self.tokens)
        total = sum(math.prod(shape) * DTYPES[kind].itemsize for kind, shape in specs.values())
        done = 0
        firsts = np.cumsum([0, *(part["hidden_scale"].shape[1] for part in self._parts)])

        def fill(name: str, put: Callable[[Any], None]) -> None:
            nonlocal done
            for piece in pieces(name):
                put(piece)
                done += piece.nbytes
                if progress is not None:
                    progress(done, total)

        def pieces(name: str) -> Any:
            if name in _OF_ALL:
                return (each[_OF_ALL.index(name)] for each in self._projections or ())
            if name in _BY_LAYER:
                return (part[name][layer] for layer in range(self.info.layers) for part in self._parts)
            if name == "starts":
                moved = (part[name][:-1] + first for part, first in zip(self._parts, firsts, strict=False))
                return (*moved, firsts[-1:])
            return (part[name] for part in self._parts)

        self._write(self.path, specs, heading(self.info), fill, total)
        self.discard()

    def discard(self) -> None:
        """Remove all parts."""
        self._parts = []
        shutil.rmtree(self.folder, ignore_errors=True)

    def _shapes(self, sequences: int, tokens: int) -> Specs:
        return shapes(self.info, sequences, tokens)

    def _part_path(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def _write(
        self, path: Path, specs: Specs, metadata: dict[str, str], fill: Callable[..., None], needed: int = 0
    ) -> None:
        self._guarded(lambda: write_tensors(path, specs, {SETTINGS: self._settings, **metadata}, fill), needed)

    def _guarded(self, work: Callable[[], Any], needed: int = 0) -> None:
        try:
            work()
        except OSError as error:
            kept = f"; the {self.sequences} sequences in {self.folder} are kept" if self._has_parts() else ""
            amount = f" ({needed / 1e6:.0f} MB are needed beside the parts)" if needed else ""
            raise TraceError(
                f"cannot write the trace to {self.path.parent}: {error.strerror or error}{amount}{kept}: make room, or "
                "name another place with -o"
            ) from error

    def _has_parts(self) -> bool:
        return bool(getattr(self, "_parts", None))

    def _read_projections(self) -> tuple[Projection, ...] | None:
        arrays = self._ours(self.folder / "projection", 0, 0, {})
        if arrays is None:
            return None
        return tuple(Projection(*each) for each in zip(*(arrays[name].copy() for name in _OF_ALL), strict=True))

    def _find_parts(self) -> list[Tensors]:
        found: list[Tensors] = []
        first = 0
        while (part := self._ours(self._part_path(len(found)), None, None, {_FIRST: str(first)})) is not None:
            found.append(part)
            first += len(part["split"])
        return found

    def _ours(self, path: Path, sequences: int | None, tokens: int | None, said: dict[str, str]) -> Tensors | None:
        """A file of these settings, whole; None for any other, or none."""
        try:
            metadata, arrays = map_tensors(path)
        except (OSError, ValueError):
            return None
        if metadata != {SETTINGS: self._settings, **said}:
            return None
        if sequences is None:
            if "split" not in arrays or "hidden_scale" not in arrays or arrays["hidden_scale"].ndim != 2:
                return None
            sequences, tokens = len(arrays["split"]), arrays["hidden_scale"].shape[1]
            wanted = {name: each for name, each in self._shapes(sequences, tokens).items() if name not in _OF_ALL}
        else:
            wanted = {name: each for name, each in self._shapes(0, 0).items() if name in _OF_ALL}
        found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
        return arrays if found == {name: (DTYPES[kind], shape) for name, (kind, shape) in wanted.items()} else None

    def _drop_others(self) -> None:
        """Remove what does not belong to the row of parts."""
        kept = {self._part_path(number) for number in range(len(self._parts))}
        if self._projections is not None:
            kept.add(self.folder / "projection")
        others = [path for path in self.folder.iterdir() if path not in kept]
        if others:
            logger.warning(
                "%d parts in %s are of other settings, or not whole: they are dropped", len(others), self.folder
            )
        for path in others:
            self._guarded(lambda path=path: path.unlink(missing_ok=True))  # type: ignore[misc]


def write_trace(path: Path, trace: Trace, settings: str = "") -> None:
    """A trace that is in memory. Raises TraceError when it cannot be written."""
    try:
        write_tensors(
            path, shapes(trace.info, trace.sequences, trace.experts.shape[1]),
            {**heading(trace.info), SETTINGS: settings}, lambda name, put: put(getattr(trace, name)),
        )  # fmt: skip
    except OSError as error:
        raise TraceError(f"cannot write the trace {path}: {error.strerror or error}: make room there") from error
