"""llama.cpp through its low-level interface: batches with a sequence per prompt, default settings otherwise."""

import ctypes
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.gguf_file import HOW_TO_INSTALL, write_gguf
from benchmarks.peers.protocol import MissingError

_FILE_TYPES = {"Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0", "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0"}
_BATCH = 512
# A log callback that drops what it is told; llama.cpp keeps its address, so it lives as long as the module.
_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda level, text, data: None)


def import_llama() -> Any:
    """The package llama_cpp, quiet. Raises MissingError where it is not installed or cannot be loaded."""
    try:
        llama = importlib.import_module("llama_cpp")
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingError(f"llama.cpp is not here ({error}): {HOW_TO_INSTALL}") from error
    llama.llama_log_set(_SILENT, None)
    llama.llama_backend_init()
    return llama


def make_file(folder: str, kind: str, threads: int) -> str:
    """The checkpoint in `folder` as GGUF of type BF16, Q8_0 or Q4_0, beside it; one that is there is taken.

    llama.cpp's own quantiser makes the latter two, all matrices in that one type (but routers, which stay f32).
    """
    llama = import_llama()
    source = Path(f"{folder}.BF16.gguf")
    target = Path(f"{folder}.{kind}.gguf")
    if target.is_file():
        return str(target)
    if not source.is_file():
        write_gguf(Path(folder), source)
    if kind != "BF16":
        params = llama.llama_model_quantize_default_params()
        params.nthread, params.ftype, params.pure = threads, getattr(llama, _FILE_TYPES[kind]), True
        beside = target.with_suffix(".part")
        status = llama.llama_model_quantize(str(source).encode(), str(beside).encode(), ctypes.byref(params))
        if status != 0:
            raise RuntimeError(f"llama_model_quantize failed with {status}")
        beside.rename(target)
    return str(target)


class LlamaEngine:
    """A GGUF file, mapped, on `threads` threads. repack: llama.cpp's default, which takes memory of its own."""

    def __init__(self, file: str, threads: int, repack: bool = True) -> None:
        self._llama = llama = import_llama()
        self._threads = threads
        self._contexts: dict[tuple[int, int], Any] = {}
        params = llama.llama_model_default_params()
        params.use_extra_bufts = repack
        self._model = llama.llama_model_load_from_file(file.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {file}")
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))

    def describe(self) -> dict[str, Any]:
        features = self._llama.llama_print_system_info().decode().strip(" |")
        return {"version": f"llama-cpp-python {self._llama.__version__}", "features": features}

    def logits(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        found = []
        for prompt in prompts:
            context = self._empty_context(1, len(prompt))
            self._feed(context, [prompt], 0, every=True)
            found.append([self._row(context, n).copy() for n in range(len(prompt))])
        return np.array(found, np.float32)

    def prefill(self, prompt: list[int]) -> float:
        context = self._empty_context(1, len(prompt))
        started = time.perf_counter()
        self._feed(context, [prompt], 0)
        self._greedy(context, -1)
        return time.perf_counter() - started

    def decode(self, prompts: list[list[int]], new_tokens: int) -> list[float]:
        length, seconds, tokens = len(prompts[0]), [], []
        context = self._empty_context(len(prompts), length + new_tokens)
        for sequence, prompt in enumerate(prompts):
            self._feed(context, [prompt], 0, first_sequence=sequence)
            tokens.append([self._greedy(context, -1)])
        for position in range(length, length + new_tokens - 1):
            started = time.perf_counter()
            self._feed(context, tokens, position)
            tokens = [[self._greedy(context, n)] for n in range(len(prompts))]
            seconds.append(time.perf_counter() - started)
        return seconds

    def _empty_context(self, sequences: int, tokens: int) -> Any:
        """A context with room for `tokens` in each sequence: an emptied one, or a new one."""
        room = -(-tokens // 256) * 256
        context = self._contexts.get((sequences, room))
        if context is not None:
            self._llama.llama_memory_clear(self._llama.llama_get_memory(context), False)
            return context
        params = self._llama.llama_context_default_params()
        params.n_seq_max, params.n_ctx = sequences, sequences * room
        params.n_batch = params.n_ubatch = _BATCH
        params.n_threads = params.n_threads_batch = self._threads
        context = self._llama.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp made no context for {sequences} sequences of {tokens} tokens")
        self._contexts[sequences, room] = context
        return context

    def _feed(
        self, context: Any, rows: list[list[int]], position: int, *, first_sequence: int = 0, every: bool = False
    ) -> None:
        """One batch: row r continues sequence first_sequence + r; logits of the last token of each row, or of all."""
        count = sum(len(row) for row in rows)
        batch = self._llama.llama_batch_init(count, 0, 1)
        try:
            batch.n_tokens = count
            at = 0
            for sequence, row in enumerate(rows, first_sequence):
                for offset, token in enumerate(row):
                    batch.token[at], batch.pos[at] = token, position + offset
                    batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                    batch.logits[at] = every or offset == len(row) - 1
                    at += 1
            status = self._llama.llama_decode(context, batch)
            if status != 0:
                raise RuntimeError(f"llama_decode failed with {status}")
            self._llama.llama_synchronize(context)
        finally:
            self._llama.llama_batch_free(batch)

    def _row(self, context: Any, index: int) -> NDArray[np.float32]:
        """Logits [vocabulary] of the batch's token `index`: a view that the next batch overwrites."""
        pointer = self._llama.llama_get_logits_ith(context, index)
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))

    def _greedy(self, context: Any, index: int) -> int:
        return int(self._row(context, index).argmax())
