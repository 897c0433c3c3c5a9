"""Text for routing traces of the demo model, from the standard library as the model's own training text is.

    python -m benchmarks.demo_model.trace_text train OUT.txt
    python -m benchmarks.demo_model.trace_text held-out OUT.jsonl

"train": the files that the model was trained on, in the order of the hashes of their paths, one behind the other.
"held-out": a stretch from the middle of each of 32 files that neither the model nor its tokenizer saw, one prompt a
line. Which text that is depends on the version of Python; the trace in the repository says its own.
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.demo_model.corpus import Document, load_corpus

HELD_OUT = 32  # files
LETTERS = 360  # of each: about 100 tokens


def _by_hash(documents: list[Document]) -> list[Document]:
    return sorted(documents, key=lambda document: hashlib.sha256(document.path.encode()).digest())


def held_out_stretches() -> list[str]:
    """A stretch of each held-out file that is long enough, from the line at its middle on."""
    found = []
    for document in _by_hash(load_corpus().held_out):
        start = document.text.find("\n", len(document.text) // 2) + 1
        if 0 < start <= len(document.text) - LETTERS:
            found.append(document.text[start : start + LETTERS])
    return found[:HELD_OUT]


def main(
    part: Annotated[str, typer.Argument(help="train or held-out")],
    out: Annotated[Path, typer.Argument(help="The file to write.")],
) -> None:
    """Write text to trace."""
    if part not in ("train", "held-out"):
        raise typer.BadParameter(f"{part} is neither train nor held-out")
    if part == "train":
        text = "\n".join(document.text for document in _by_hash(load_corpus().train))
    else:
        text = "".join(json.dumps({"prompt": stretch}) + "\n" for stretch in held_out_stretches())
    out.write_text(text, encoding="utf-8")
    sys.stderr.write(f"{len(text)} characters in {out}\n")


if __name__ == "__main__":
    typer.run(main)
