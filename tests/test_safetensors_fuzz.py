"""A safetensors header may say anything. What is read must lie in the file, or a CheckpointError is raised."""

import json
import re
import struct
import subprocess
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_offload.models.checkpoint import Checkpoint
from moe_offload.models.errors import CheckpointError, MoeOffloadError
from moe_offload.models.safetensors_header import DTYPE_BITS, read_header
from tests import cli_model

ROOT = Path(__file__).parents[1]
DATA = bytes(range(256)) * 2
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [4, 16], "data_offsets": [0, 256]},
    "b.weight": {"dtype": "BF16", "shape": [128], "data_offsets": [256, 512]},
}
VALID = struct.pack("<Q", len(json.dumps(HEADER))) + json.dumps(HEADER).encode() + DATA

numbers = st.one_of(
    st.integers(-2, 600),
    st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**400, -(2**63)]),
    st.floats(),
    st.booleans(),
    st.none(),
    st.text(max_size=3),
)
anything = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*DTYPE_BITS, "F7", ""]) | anything,
        "shape": st.lists(numbers, max_size=40) | anything,
        "data_offsets": st.lists(numbers, min_size=2, max_size=2) | anything,
        "more": anything,
    },
)
headers = st.dictionaries(st.text(max_size=6) | st.just("__metadata__"), entries | anything, max_size=4)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A valid file with some bytes of its length or header changed, cut off or put in."""
    content = bytearray(VALID)
    end = len(VALID) - len(DATA)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(end, len(content)) - 1)) if content else 0
        kind = draw(st.sampled_from(["flip", "set", "insert", "delete", "cut", "digits"]))
        if kind == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and content:
            content[at] = draw(st.integers(0, 255))
        elif kind == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif kind == "delete":
            del content[at : at + draw(st.integers(1, 8))]
        elif kind == "cut":
            del content[draw(st.integers(0, len(content))) :]
        else:
            content = bytearray(_other_number(bytes(content), draw(st.integers(0, 20)), draw(numbers)))
    return bytes(content)


def _other_number(content: bytes, which: int, number: object) -> bytes:
    """The header's number number `which` replaced, with a length prefix that fits."""
    text = content[8 : len(content) - len(DATA)]
    found = list(re.finditer(rb"\d+", text))
    if not found:
        return content
    match = found[which % len(found)]
    text = text[: match.start()] + json.dumps(number).encode() + text[match.end() :]
    return struct.pack("<Q", len(text)) + text + content[len(content) - len(DATA) :]


def check(path: Path, content: bytes) -> None:
    """The property: an error of ours, or every byte of every record lies in the file and can be read."""
    path.write_bytes(content)
    try:
        records = read_header(path)
    except CheckpointError as error:
        assert len(str(error)) < 2000, "one line, not a novel"
        return
    length = struct.unpack("<Q", content[:8])[0]
    for name, record in records.items():
        assert record.name == name and record.path == path
        assert 8 + length <= record.offset <= record.offset + record.nbytes <= len(content)
        count = 1
        for size in record.shape:
            count *= size
        assert count * DTYPE_BITS[record.dtype] == record.nbytes * 8
    assert sum(record.nbytes for record in records.values()) == len(content) - 8 - length
    checkpoint = Checkpoint([path])
    for record in records.values():
        try:
            checkpoint.view(record).clone()  # reads every byte through the mapping
        except MoeOffloadError:
            pass
    checkpoint.close()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


fuzzed = settings(deadline=None, max_examples=400, suppress_health_check=list(HealthCheck))


def test_valid_file(path: Path) -> None:
    check(path, VALID)
    assert list(read_header(path)) == ["a", "b.weight"]


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2**62] * 20, "data_offsets": [0, 0]},  # more bytes than a float can count
        {"dtype": "F32", "shape": [1] * 100_000, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2**62] * 100_000, "data_offsets": [0, 4]},
        {"dtype": "F" * 100_000, "shape": [], "data_offsets": [0, 0]},
        {"dtype": "F32", "shape": [10**4000], "data_offsets": [0, 4]},
        {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]},
        {"dtype": "U8", "shape": [True], "data_offsets": [False, True]},
    ],
    ids=["product", "dimensions", "huge dimensions", "dtype", "digits", "half a byte", "booleans"],
)
def test_refused_in_one_line(path: Path, entry: dict[str, Any]) -> None:
    text = json.dumps({"a": entry}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"a":' + b"9" * 5000 + b"}", b'{"\xff":1}', b"\xff\xfe{\0}\0", b""],
    ids=["lists", "objects", "digits", "no UTF-8", "UTF-16", "nothing"],
)
def test_refused_json(path: Path, text: bytes) -> None:
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="not valid JSON"):
        read_header(path)


def test_name_in_full(path: Path) -> None:
    name = "model.layers.17.mlp.experts.117.down_proj.weight"
    text = json.dumps({name: {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match=name):
        read_header(path)


@fuzzed
@given(content=mutations())
def test_mutated_file(path: Path, content: bytes) -> None:
    check(path, content)


@fuzzed
@given(header=headers, extra=st.binary(max_size=64))
def test_any_json(path: Path, header: Any, extra: bytes) -> None:
    text = json.dumps(header).encode()
    check(path, struct.pack("<Q", len(text)) + text + extra)


@fuzzed
@given(header=anything | st.text(), length=st.integers(0, 2**64 - 1) | st.integers(0, 64))
def test_any_length(path: Path, header: Any, length: int) -> None:
    check(path, struct.pack("<Q", length) + json.dumps(header).encode())


@fuzzed
@given(content=st.binary(max_size=300))
def test_any_bytes(path: Path, content: bytes) -> None:
    check(path, content)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model in one file."""
    folder = cli_model.make_folder(tmp_path_factory.mktemp("load") / "model", max_shard_size="1GB")
    assert (folder / "model.safetensors").is_file()
    return folder


def mutate(original: bytes, seed: int) -> bytes:
    """One random lie in the header of a real checkpoint, mostly such that it is still JSON."""
    random = Random(seed)
    length = int.from_bytes(original[:8], "little")
    header = json.loads(original[8 : 8 + length])
    data = original[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    name, other = random.choice(names), random.choice(names)
    entry = header[name]
    match random.randrange(10):
        case 0:
            entry["dtype"] = random.choice([*DTYPE_BITS, "X"])
        case 1:
            entry["shape"] = random.choice([entry["shape"][::-1], [*entry["shape"], 1], [0], [], [2**62] * 4])
        case 2:
            entry["data_offsets"] = [n + random.choice([-4, 0, 4, 2**40]) for n in entry["data_offsets"]]
        case 3:
            entry["data_offsets"], header[other]["data_offsets"] = (
                header[other]["data_offsets"], entry["data_offsets"],
            )  # fmt: skip
        case 4:
            header[name], header[other] = header[other], header[name]
        case 5:
            header[name + "x"] = header.pop(name)
        case 6:
            del header[name]
        case 7:  # the same bytes by another name of the same size
            entry["dtype"] = {"F32": random.choice(["I32", "U32"])}.get(entry["dtype"], "U8")
        case 8:
            data = data[: random.randrange(len(data))]
        case 9:
            at = random.randrange(8 + length)
            return original[:at] + bytes([random.randrange(256)]) + original[at + 1 :]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def load_mutations(folder: Path, seeds: range) -> tuple[int, int]:
    """Load `folder` with a mutated checkpoint for each seed: how many loaded and ran, how many were refused."""
    import torch

    import moe_offload

    target = folder / "model.safetensors"
    original = target.read_bytes()
    ran = refused = 0
    for seed in seeds:
        target.unlink()  # never in place: a mapping of the last one may still be alive
        target.write_bytes(mutate(original, seed))
        try:
            model = moe_offload.load(folder, threads=1)
        except MoeOffloadError as error:
            assert str(error)
            refused += 1
        else:
            with model.offload, torch.no_grad():
                model(torch.arange(3, 20)[None])
            ran += 1
    return ran, refused


def test_mutated_checkpoints_through_load(model: Path) -> None:
    """In a process of its own, so that a crash of it is seen as one."""
    code = (
        "import sys, torch, transformers; from pathlib import Path; from tests import test_safetensors_fuzz as fuzz;"
        "torch.set_num_threads(1); transformers.logging.set_verbosity(50);"
        "transformers.utils.logging.disable_progress_bar();"
        "print(*fuzz.load_mutations(Path(sys.argv[1]), range(60)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ran, refused = map(int, done.stdout.split())
    assert ran + refused == 60 and refused >= 30
