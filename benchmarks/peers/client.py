"""The other end of worker.py."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.protocol import MissingError

_ROOT = Path(__file__).parents[2]


class Worker:
    """A process that holds one engine; a context manager that ends it. A `Contestant`."""

    most_tokens = math.inf

    def __init__(self, name: str, python: str = sys.executable) -> None:
        """name: one that worker.py knows. python: the interpreter that has what it needs."""
        self.name = name
        try:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.peers.worker", name],
                cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
        except OSError as error:
            raise MissingError(f"{python} cannot be started: {error}") from error

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def call(self, method: str, **arguments: Any) -> Any:
        """The method's result. Raises MissingError when the engine cannot be had, RuntimeError when it failed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"method": method, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the {self.name} worker ended with status {self._process.wait()} in {method}")
        reply = json.loads(line)
        if "missing" in reply:
            raise MissingError(reply["missing"])
        if "error" in reply:
            raise RuntimeError(f"the {self.name} worker failed in {method}:\n{reply['error']}")
        return reply["result"]

    def logits(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        """As `Engine.logits`."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "logits.npy"
            self.call("logits", prompts=prompts, file=str(file))
            found: NDArray[np.float32] = np.load(file)
        return found


class Implementation:
    """One of the experts implementations of a transformers worker, as a contestant of its own: one model in memory."""

    def __init__(self, worker: Worker, name: str, most_tokens: float = math.inf) -> None:
        self._worker, self._name, self.most_tokens = worker, name, most_tokens

    def call(self, method: str, **arguments: Any) -> Any:
        """The method's result with this implementation."""
        self._worker.call("choose", implementation=self._name)
        return self._worker.call(method, **arguments)

    def logits(self, prompts: list[list[int]]) -> NDArray[np.float32]:
        """As of `Engine`; of the prompts' beginnings only, where it has no memory for more."""
        self._worker.call("choose", implementation=self._name)
        return self._worker.logits([prompt[: int(min(self.most_tokens, len(prompt)))] for prompt in prompts])
