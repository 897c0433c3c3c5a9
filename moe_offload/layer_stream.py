"""The reference's logits for many sequences, its layers' weights in memory one after the other.

All sequences' forwards are suspended side by side (`suspended_forward.py`). The layer that they wait for is filled,
runs for each of them, and is emptied. They stop again in front of the head, where all that is held of a sequence is a
hidden state per token; `logits` lets one of them go on to its end.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from moe_offload.suspended_forward import SuspendedForward, stopping_at
from moe_offload.verify_reference import Reference

Progress = Callable[[int, int], None]  # layers that are done, layers in all


class LayerStream:
    """`with LayerStream(reference) as stream: stream.run(batches); stream.logits(0)`."""

    def __init__(self, reference: Reference) -> None:
        self._reference = reference
        self._forwards: list[SuspendedForward] = []
        self._stops = ExitStack()

    def __enter__(self) -> Self:
        reference = self._reference
        self._stops.enter_context(stopping_at([*reference.layers.values(), *reference.others]))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for each in self._forwards:
            each.close()
        self._forwards.clear()
        self._stops.close()

    @torch.inference_mode()
    def run(self, batches: Sequence[torch.Tensor], progress: Progress | None = None) -> None:
        """Bring token ids, [B, T] each, to the head."""
        reference = self._reference
        paths = {layer: path for path, layer in reference.layers.items()}
        for ids in batches:
            forward = SuspendedForward(partial(reference.model, input_ids=ids, use_cache=False))
            self._forwards.append(forward)
            forward.start()
        done = 0
        while (module := self._awaited()) is not None:
            path = paths.get(module)
            with nullcontext() if path is None else self._filled(path):
                for each in self._forwards:
                    if each.call is not None and each.call.module is module:
                        each.answer(each.call())
            if path is not None:
                done += 1
                if progress is not None:
                    progress(min(done, len(paths)), len(paths))

    @torch.inference_mode()
    def logits(self, batch: int) -> torch.Tensor:
        """[B, T, V] in f32 of one of the batches; once."""
        forward = self._forwards[batch]
        while forward.call is not None:
            forward.answer(forward.call())
        result: Any = forward.result
        forward.result = None
        logits: torch.Tensor = result.logits.float()
        return logits

    def _awaited(self) -> nn.Module | None:
        """A module that a forward waits for; None where all are at the head or through."""
        calls = (each.call for each in self._forwards if each.call is not None)
        return next((call.module for call in calls if call.module is not self._reference.head), None)

    @contextmanager
    def _filled(self, path: str) -> Iterator[None]:
        try:
            self._reference.fill(path)
            yield
        finally:
            self._reference.empty(path)
