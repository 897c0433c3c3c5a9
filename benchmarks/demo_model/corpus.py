"""The text of the demo model: the Python standard library, as every installation has it.

Every `.py` file below `sysconfig.get_paths()["stdlib"]` counts, except site-packages, the test
suites (two thirds of the bytes, and not the code anybody would want completed), tables of
characters, and files that a build writes (they hold paths of one machine).
A file belongs to the held-out set if the hash of its relative path says so: the split needs no
list, no random state, and is the same on every machine with the same Python version.
A held-out file half of whose lines stand in the training files as well is left out of both.

From the training files a second set of documents is made: conversations, in which a docstring's
first line is what the user says and the function is the reply. They teach the turn tokens.
"""

import ast
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HELD_OUT_SHARE = 0.08
SKIPPED_FOLDERS = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
TABLE_MARKS = ("decoding_table", "decoding_map")
GENERATED_PREFIXES = ("_sysconfigdata", "config-", "pydoc_data")
MAX_REPLY_BYTES = 1500

BOS, EOS, PAD, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [BOS, EOS, PAD, USER, ASSISTANT]


@dataclass(frozen=True, slots=True)
class Document:
    path: str  # relative to the standard library's folder, with forward slashes
    text: str


@dataclass(frozen=True, slots=True)
class Corpus:
    train: list[Document]
    held_out: list[Document]
    dropped: list[str]  # held-out files too much like training files


def is_held_out(path: str) -> bool:
    """Decide by the path alone, so that a file's side never depends on the other files."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def load_corpus(root: Path | None = None) -> Corpus:
    """Read the standard library and split it by file."""
    documents = list(_documents(root or Path(sysconfig.get_paths()["stdlib"])))
    train = [document for document in documents if not is_held_out(document.path)]
    known = {line for document in train for line in _telling_lines(document.text)}
    held_out: list[Document] = []
    dropped: list[str] = []
    for document in documents:
        if not is_held_out(document.path):
            continue
        lines = _telling_lines(document.text)
        if sum(line in known for line in lines) * 2 > len(lines):
            dropped.append(document.path)
        else:
            held_out.append(document)
    return Corpus(train, held_out, dropped)


def conversations(documents: list[Document]) -> Iterator[list[dict[str, str]]]:
    """Per file one conversation: docstring in, function out, in the file's order.

    The module docstring's first line is the system message where there is one.
    """
    for document in documents:
        try:
            tree = ast.parse(document.text)
        except SyntaxError:
            continue
        turns: list[dict[str, str]] = []
        for request, reply in _documented_functions(tree, document.text):
            turns.append({"role": "user", "content": request})
            turns.append({"role": "assistant", "content": reply})
        if not turns:
            continue
        summary = _first_line(tree)
        if summary:
            turns.insert(0, {"role": "system", "content": summary})
        yield turns


def render(conversation: list[dict[str, str]]) -> str:
    """What the chat template makes of a conversation; `tests/test_demo_model.py` compares them."""
    parts = [BOS]
    for message in conversation:
        content = message["content"].strip("\n")
        match message["role"]:
            case "system":
                parts.append(f'"""{content}"""\n')
            case "user":
                parts.append(f"{USER}{content}")
            case _:
                parts.append(f"{ASSISTANT}{content}{EOS}")
    return "".join(parts)


def _documents(root: Path) -> Iterator[Document]:
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED_FOLDERS & set(relative.parts[:-1]):
            continue
        if any(part.startswith(GENERATED_PREFIXES) for part in relative.parts):
            continue
        try:
            text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if len(text) < 64 or any(mark in text for mark in TABLE_MARKS):
            continue
        yield Document(relative.as_posix(), text)


def _telling_lines(text: str) -> list[str]:
    """Lines long enough that two files share them by copying rather than by chance."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) >= 24]


def _first_line(node: ast.Module | ast.FunctionDef) -> str:
    docstring = ast.get_docstring(node) or ""
    line = docstring.strip().split("\n")[0].strip()
    return line if 12 <= len(line) <= 120 and '"""' not in line else ""


def _documented_functions(tree: ast.Module, text: str) -> Iterator[tuple[str, str]]:
    lines = text.splitlines(keepends=True)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    for node in sorted(functions, key=lambda node: node.lineno):
        request = _first_line(node)
        source = "".join(lines[node.lineno - 1 : node.end_lineno])
        if not request or len(source) > MAX_REPLY_BYTES or len(node.body) < 2:
            continue
        indent = " " * node.col_offset
        yield (
            request,
            "".join(line.removeprefix(indent) for line in source.splitlines(keepends=True)).rstrip("\n") + "\n",
        )
