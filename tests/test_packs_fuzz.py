"""Packs with headers that were damaged or made up: none of them leads anywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moe_offload.pack_cache import PackCache
from moe_offload.transfer import pack_layout
from moe_offload.transfer.expert_pack import ExpertPack
from moe_offload.transfer.pack_layout import UnusablePackError
from tests.pack_files import ALL, PLAN, Conversion, check

numbers = st.integers(-2, 600) | st.sampled_from([2**31, 2**63, 2**64, 10**400, -(2**63)]) | st.floats()
anything = st.recursive(
    numbers | st.booleans() | st.none() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.pack"
    PackCache(path, PLAN).open(Conversion()).close()
    return path


@st.composite
def other_headers(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A change of the header: some bytes of it, or one of its values."""
    kind = draw(st.sampled_from(["bytes", "value", "section", "text"]))
    places = draw(st.lists(st.tuples(st.integers(0, 700), st.integers(0, 255)), min_size=1, max_size=4))
    value, which, key = draw(anything), draw(st.integers(0, 2)), draw(st.integers(0, 12))

    def change(original: bytes) -> bytes:
        if kind == "bytes":
            changed = bytearray(original)
            for at, byte in places:
                changed[at] = byte
            return bytes(changed)
        length = int.from_bytes(original[16:24], "little")
        header = json.loads(original[24 : 24 + length])
        if kind == "value":
            header[["key", "sections"][which % 2]] = value
        elif kind == "section":
            section = header["sections"][which]
            section[sorted(section)[key % len(section)]] = value
        else:
            header = value
        text = json.dumps(header).encode()
        start = original[:16] + len(text).to_bytes(8, "little") + text
        return start.ljust(PLAN.data_start, b"\0") + original[PLAN.data_start :]

    return change


@settings(deadline=None, max_examples=300, suppress_health_check=list(HealthCheck))
@given(change=other_headers())
def test_no_header_leads_anywhere_but_to_the_plan(whole: Path, change: Callable[[bytes], bytes]) -> None:
    original = whole.read_bytes()
    path = whole.with_name("mutated.pack")
    path.unlink(missing_ok=True)
    path.write_bytes(change(original))
    try:
        pack = ExpertPack(path, PLAN)
    except UnusablePackError as error:
        assert len(str(error)) < 200
        assert path.read_bytes() != original
    else:
        damaged = pack.find_damage(1)  # a checksum may be another one
        check(pack)
        assert damaged is None or damaged.split(",")[0] in ALL


@settings(deadline=None, max_examples=30, suppress_health_check=list(HealthCheck))
@given(change=other_headers())
def test_any_header_ends_in_a_whole_pack(whole: Path, change: Callable[[bytes], bytes]) -> None:
    path = whole.with_name("again.pack")
    path.unlink(missing_ok=True)
    path.write_bytes(change(whole.read_bytes()))
    check(PackCache(path, PLAN).open(Conversion()))


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.binary(max_size=300), header=anything)
def test_files_that_are_no_packs(whole: Path, data: bytes, header: Any) -> None:
    path = whole.with_name("none.pack")
    text = json.dumps(header).encode()
    prefix = pack_layout.MAGIC + (1).to_bytes(8, "little")
    for each in (data, prefix + data, prefix + len(text).to_bytes(8, "little") + text):
        path.unlink(missing_ok=True)
        path.write_bytes(each)
        with pytest.raises(UnusablePackError):
            PLAN.read_checksums(path)
