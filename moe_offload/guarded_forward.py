"""A model's forward on a device that may run out of memory, or fail, while a text is being generated.

`GuardedForward` stands in the place of the model's `forward` (an attribute of the instance). Forwards have the device
one after the other, also those of several threads. Before a forward the KV cache is placed; then

- out of device memory: expert slots are given up, what the failed attempt put into the cache is taken back, and the
  forward runs again;
- device lost, or too small even with the fewest slots: the engine goes on with the CPU alone. Keys and values are
  computed again from the tokens, and the forward runs again: the sequence goes on with the same tokens. One warning
  tells of it.
"""

import copy
import functools
import inspect
import logging
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from moe_offload.cache_rescue import can_be_emptied, empty, padding_mask, take_back
from moe_offload.decode_layer import plain_cache
from moe_offload.device_side import DeviceSide
from moe_offload.token_history import TokenHistory, begin_history, history_of
from moe_offload.transfer.accelerator import DeviceError, DeviceLostError, OutOfDeviceMemoryError
from moe_offload.transfer.cuda_errors import device_error

logger = logging.getLogger(__name__)

TRIES = 16


class GuardedForward:
    """Stands for `model.forward`. `engine` has `device` (None once it is lost) and `lose_device()`."""

    def __init__(self, model: PreTrainedModel, engine: Any) -> None:
        self.model, self.engine = model, engine
        original = type(model).forward
        functools.update_wrapper(self, original)
        # generate() looks at the parameters of what it calls
        self.__signature__ = inspect.signature(original.__get__(model))
        self._names = list(self.__signature__.parameters)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GuardedForward":
        return GuardedForward(copy.deepcopy(self.model, memo), self.engine)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        kwargs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        cache = kwargs.get("past_key_values")
        result = self._run(kwargs, cache)
        if cache is None:
            cache = getattr(result, "past_key_values", None)  # which the model has made for itself
        if plain_cache(cache):
            self._note(cache, kwargs)
        return result

    def _run(self, kwargs: dict[str, Any], cache: Any) -> Any:
        before = _length(cache)
        for left in range(TRIES, -1, -1):
            side: DeviceSide | None = self.engine.device
            if side is None:
                break
            with side.turn:
                if self.engine.device is not side:  # lost by the thread that had it before
                    break
                try:
                    return self._attempt(side, kwargs, cache, before)
                except (OutOfDeviceMemoryError, torch.OutOfMemoryError) as error:
                    # what torch has no memory for is not counted: the budget was too much
                    if left and side.give_up_slots(for_good=isinstance(error, torch.OutOfMemoryError)):
                        logger.warning(
                            "the device is out of memory (%s): %d expert slots are left", str(error), len(side.slots)
                        )
                        self._take_back(side, cache, before, error)
                    else:
                        self._go_on_without(cache, before, error)
                except RuntimeError as error:  # of ours, or of torch's own operations on the device
                    if not isinstance(error, DeviceLostError) and not isinstance(device_error(error), DeviceLostError):
                        raise
                    self._go_on_without(cache, before, error)
        return self._attempt(None, kwargs, cache, before)

    def _attempt(self, side: DeviceSide | None, kwargs: dict[str, Any], cache: Any, before: int) -> Any:
        """The forward, behind another one that fills a cache which was emptied."""
        history = _history(cache)
        if history is not None:
            if history.device != self.engine.lost_devices:
                self._empty(cache, before, DeviceError("the device is lost that held keys and values"))
            if not history.filled:
                self._fill(side, cache, history, kwargs)
        return self._forward(side, kwargs)

    def _forward(self, side: DeviceSide | None, kwargs: dict[str, Any]) -> Any:
        forward = type(self.model).forward
        if side is None:
            return forward(self.model, **kwargs)
        side.before_forward(self.model, kwargs)
        try:
            return forward(self.model, **side.carry_in(kwargs))
        finally:
            side.end_step()

    def _go_on_without(self, cache: Any, before: int, error: Exception) -> None:
        # as text: whoever keeps the exception keeps the frames in its traceback, and with them a KV cache
        logger.warning("%s; the model goes on with the CPU alone", str(error))
        self.engine.lose_device()
        if isinstance(cache, Cache):
            self._empty(cache, before, error)

    def _take_back(self, side: DeviceSide, cache: Any, before: int, error: Exception) -> None:
        """Make the cache what it was before an attempt that failed half way, or empty."""
        history = _history(cache)
        filled = history is None or history.filled
        if isinstance(cache, Cache) and not (filled and take_back(cache, before)):
            self._empty(cache, before, error)
            if side.placement is not None:
                side.placement.reconsider()

    def _empty(self, cache: Any, before: int, error: Exception) -> None:
        """Drop what the cache holds, to be computed again."""
        history = _history(cache)
        known = history is not None and history.complete and history.ids is not None
        if not can_be_emptied(cache) or (before and not known):
            raise _unknown(error)
        empty(cache, self.model.config)
        if history is not None:
            history.cut(before)
            history.device, history.filled = self.engine.lost_devices, not before

    def _fill(self, side: DeviceSide | None, cache: Any, history: TokenHistory, kwargs: dict[str, Any]) -> None:
        """Compute the keys and values of all tokens again."""
        assert history.ids is not None
        try:
            mask = padding_mask(kwargs.get("attention_mask"), history.ids.shape[1])
        except ValueError as error:
            raise _unknown(error) from error
        with torch.no_grad():
            self._forward(
                side,
                dict(
                    input_ids=history.ids, position_ids=history.positions, attention_mask=mask, past_key_values=cache,
                    use_cache=True,
                ),
            )  # fmt: skip
        history.filled = True

    def _note(self, cache: Any, kwargs: dict[str, Any]) -> None:
        """Write down what went into the cache."""
        ids = kwargs.get("input_ids")
        length = _length(cache)
        history = history_of(cache)
        if history is None:
            if ids is None or length < ids.shape[1]:
                return
            history = begin_history(cache, self.engine.lost_devices)
            history.complete = length == ids.shape[1]
        positions = kwargs.get("position_ids")
        if ids is None or (positions is not None and positions.dim() != 2):
            history.complete = False
        elif history.complete:
            history.cut(length - ids.shape[1])
            history.append(ids, positions)


def _history(cache: Any) -> TokenHistory | None:
    return history_of(cache) if plain_cache(cache) else None


def _length(cache: Any) -> int:
    """Positions in a cache, or that were in it before it was emptied."""
    if not isinstance(cache, Cache):
        return 0
    history = _history(cache)
    if history is not None and not history.filled and history.ids is not None:
        return int(history.ids.shape[1])
    return int(cache.get_seq_length())


def _unknown(error: Exception) -> DeviceLostError:
    found = DeviceLostError(
        f"{error}; the tokens behind its keys and values are not known, so this text cannot go on: generate it again"
    )
    found.__cause__ = error
    return found
