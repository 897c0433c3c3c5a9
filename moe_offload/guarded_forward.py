"""A model's forward on a device that may run out of memory, or fail, while a text is being generated.

`GuardedForward` stands in the place of the model's `forward` (an attribute of the instance). Before a forward the KV
cache is placed; then

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
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from moe_offload.decode_layer import plain_cache
from moe_offload.device_side import DeviceSide
from moe_offload.token_history import begin_history, history_of
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
        before = cache.get_seq_length() if isinstance(cache, Cache) else 0
        if plain_cache(cache):
            self._bring_back(cache, kwargs, before)
        result = self._run(kwargs, cache, before)
        if plain_cache(cache):
            self._note(cache, kwargs)
        return result

    def _run(self, kwargs: dict[str, Any], cache: Any, before: int) -> Any:
        for left in range(TRIES, -1, -1):
            side: DeviceSide | None = self.engine.device
            if side is None:
                break
            try:
                side.before_forward(self.model, kwargs)
                try:
                    return self._forward(side.carry_in(kwargs))
                finally:
                    side.end_step()
            except (OutOfDeviceMemoryError, torch.OutOfMemoryError) as error:
                if left and side.give_up_slots():
                    logger.warning("the device is out of memory (%s): %d expert slots are left", error, len(side.slots))
                    self._take_back(cache, before)
                else:
                    self._go_on_without(error, cache, kwargs, before)
            except RuntimeError as error:  # of ours, or of torch's own operations on the device
                if not isinstance(error, DeviceLostError) and not isinstance(device_error(error), DeviceLostError):
                    raise
                self._go_on_without(error, cache, kwargs, before)
        return self._forward(kwargs)

    def _forward(self, kwargs: dict[str, Any]) -> Any:
        return type(self.model).forward(self.model, **kwargs)

    def _go_on_without(self, error: Exception, cache: Any, kwargs: dict[str, Any], before: int) -> None:
        logger.warning("%s; the model goes on with the CPU alone", error)
        self.engine.lose_device()
        if isinstance(cache, Cache):
            self._restore(cache, kwargs, before, error)

    def _take_back(self, cache: Any, before: int) -> None:
        """Make the cache what it was before an attempt that failed half way."""
        if not isinstance(cache, Cache) or all(layer.get_seq_length() <= before for layer in cache.layers):
            return
        if before:
            cache.crop(before)
        else:
            cache.layers[:] = DynamicCache(config=self.model.config).layers

    def _bring_back(self, cache: Any, kwargs: dict[str, Any], before: int) -> None:
        """A cache that a lost device took along, filled again."""
        history = history_of(cache)
        if history is not None and history.device != self.engine.lost_devices:
            self._restore(cache, kwargs, before, DeviceError("the device is lost that held keys and values"))

    def _restore(self, cache: Any, kwargs: dict[str, Any], before: int, error: Exception) -> None:
        """Compute `before` positions of the cache again."""
        history = history_of(cache)
        if before and (history is None or not history.complete or history.ids is None):
            raise DeviceLostError(
                f"{error}; the tokens behind its keys and values are not known, so this text cannot go on: "
                "generate it again"
            ) from error
        # bound to a name of its own: the model's forward fills it as if it were new
        cache.layers[:] = DynamicCache(config=self.model.config).layers
        if history is None:
            return
        history.device = self.engine.lost_devices
        if before and history.ids is not None and history.positions is not None:
            history.cut(before)
            mask = kwargs.get("attention_mask")
            with torch.no_grad():
                type(self.model).forward(
                    self.model, input_ids=history.ids, position_ids=history.positions,
                    attention_mask=mask[:, :before].cpu() if mask is not None and mask.dim() == 2 else None,
                    past_key_values=cache, use_cache=True,
                )  # fmt: skip

    def _note(self, cache: Any, kwargs: dict[str, Any]) -> None:
        """Write down what went into the cache."""
        ids = kwargs.get("input_ids")
        length = cache.get_seq_length()
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
