"""The reference's logits for many sequences, its layers' weights in memory one after the other.

All sequences' forwards are suspended side by side (`suspended_forward.py`). The layer that they wait for is filled,
runs for each of them, and is emptied. They stop again in front of the head, where all that is held of a sequence is a
hidden state per token; `logits` lets one of them go on to its end.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch

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
            self._forwards.append(SuspendedForward(lambda ids=ids: reference.model(input_ids=ids, use_cache=False)))
        done = 0
        while module := next(
            (m for each in self._forwards if (m := _waits_for(each)) not in (None, reference.head)), None
        ):
            path = paths.get(module)
            if path is not None:
                reference.fill(path)
            try:
                for each in self._forwards:
                    if each.call is not None and each.call.module is module:
                        each.answer(each.call())
            finally:
                if path is not None:
                    reference.empty(path)
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


def _waits_for(forward: SuspendedForward) -> Any:
    return None if forward.call is None else forward.call.module
