"""An engine in a process of its own: requests and replies are lines of JSON on its standard input and output.

    python -m benchmarks.peers.worker llama.cpp|moe_offload|transformers|accelerate

A request names a method and its arguments: `make_file` and `open` come first, then the methods of `Engine`, and
`choose` where an engine has several ways to run the same model. Logits are saved to the file named in the request. What
libraries print goes to standard error.
"""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.peers.protocol import Engine, MissingError


def openers(name: str) -> dict[str, Callable[..., Any]]:
    """What the named worker can do before an engine is open. Each engine's imports are its own."""
    if name == "llama.cpp":
        from benchmarks.peers.llama_engine import LlamaEngine, make_file

        return {"make_file": make_file, "open": LlamaEngine}
    from benchmarks.peers import torch_engine

    engines = {
        "moe_offload": torch_engine.OffloadEngine,
        "transformers": torch_engine.TransformersEngine,
        "accelerate": torch_engine.AccelerateEngine,
    }
    return {"open": engines[name]}


def main(name: str) -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    handlers = openers(name)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = {"result": _answer(handlers, request["method"], request["arguments"])}
        except MissingError as error:
            reply = {"missing": str(error)}
        except Exception:
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def _answer(handlers: dict[str, Callable[..., Any]], method: str, arguments: dict[str, Any]) -> Any:
    if method == "open":
        engine: Engine = handlers["open"](**arguments)

        def save_logits(prompts: list[list[int]], file: str) -> None:
            np.save(file, engine.logits(prompts))

        handlers.update(describe=engine.describe, prefill=engine.prefill, decode=engine.decode, logits=save_logits)
        if hasattr(engine, "choose"):
            handlers["choose"] = engine.choose
        return None
    return handlers[method](**arguments)


if __name__ == "__main__":
    main(sys.argv[1])
