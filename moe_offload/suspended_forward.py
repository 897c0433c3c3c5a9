"""Forwards of a model that stop at chosen modules and go on when they are told what the module gives.

Each runs on a thread of its own, so that the model's own code need not be known, let alone repeated: whatever it does
between its layers it does. Never do two threads run at once, and what has parameters runs on the owner's thread:

    forward's thread                          owner's thread
    model(ids) calls a chosen module    ->    `call` says which one, with which arguments
       (waits)                                computes, or lets other forwards get as far first
    the call returns the answer         <-    answer(value)
    ...                                       until `call` is None: `result`
"""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn


class _Abandoned(BaseException):
    """Unwinds a forward that nobody waits for; no model catches it."""


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """What a forward waits for: this module's own `forward`, with these arguments."""

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self) -> Any:
        return self.forward(*self.args, **self.kwargs)


class SuspendedForward:
    """One call of a model: `start` it, answer until there is no `call`, take the `result`; `close` it in any case."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self.call: ModuleCall | None = None
        self.result: Any = None
        self._run = run
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._asks: SimpleQueue[ModuleCall | BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="forward", daemon=True)

    def start(self) -> None:
        """Run until the first chosen module or the end."""
        self._thread.start()
        self._wait()

    def answer(self, value: Any) -> None:
        """Go on with `value` as what the module gave, until the next chosen module or the end."""
        self.call = None
        self._answers.put(value)
        self._wait()

    def close(self) -> None:
        """Unwind. Harmless when done twice, or at the end."""
        self.call = None
        self._answers.put(_Abandoned())
        if self._thread.is_alive():
            self._thread.join()

    def ask(self, call: ModuleCall) -> Any:
        """On the forward's own thread: have the owner run this module."""
        self._asks.put(call)
        value = self._answers.get()
        if isinstance(value, _Abandoned):
            raise value
        return value

    def _wait(self) -> None:
        asked = self._asks.get()
        if isinstance(asked, BaseException):
            raise asked
        self.call = asked

    def _work(self) -> None:
        _current.forward = self
        try:
            with torch.inference_mode():
                self.result = self._run()
        except _Abandoned:
            pass
        except BaseException as error:
            self._asks.put(error)
        else:
            self._asks.put(None)


_current = threading.local()  # .forward: whose thread this is


@contextmanager
def stopping_at(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While this is entered, suspended forwards stop at these modules; on other threads nothing changes."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    for module, _ in before:
        module.__dict__["forward"] = _stop(module)
    try:
        yield
    finally:
        for module, own in before:
            del module.__dict__["forward"]
            if own is not None:
                module.__dict__["forward"] = own


def _stop(module: nn.Module) -> Callable[..., Any]:
    forward = module.forward

    def called(*args: Any, **kwargs: Any) -> Any:
        owner: SuspendedForward | None = getattr(_current, "forward", None)
        if owner is None:
            return forward(*args, **kwargs)
        return owner.ask(ModuleCall(module, forward, args, kwargs))

    return called
