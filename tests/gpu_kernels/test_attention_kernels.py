"""Decode attention's kernels on the CPU beside float64: all types, shapes, orders of threads, and planted bugs."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.gpu_kernels.decode_attention import (
    KV_TYPES,
    SOURCE,
    VARIANTS,
    DecodeAttention,
    DecodeShape,
    aligned,
)
from moe_offload.gpu_kernels.launch import Argument, Kernel, KernelError, Macros
from moe_offload.gpu_kernels.sources import read_source
from tests.gpu_kernels.attention_cases import ROUNDING, Case, make_case
from tests.gpu_kernels.host_kernels import ORDERS, SANITIZE, HostKernels, needs_compiler, numbers_only

pytestmark = needs_compiler
F32, F16, BF16, INT8 = KV_TYPES
PLAIN = DecodeShape(6, 2, 40, 40, F16)  # three heads share keys; five of a row's eight lanes have elements
# Few, since each is compiled; between them every number of lanes, tiles, and more heads than a block takes.
SHAPES = (
    PLAIN,
    DecodeShape(1, 1, 8, 8, F32),
    DecodeShape(2, 1, 16, 8, BF16),
    DecodeShape(9, 1, 24, 32, F32),
    DecodeShape(17, 1, 64, 64, BF16),
    DecodeShape(33, 1, 16, 16, F16),
    DecodeShape(4, 2, 192, 128, BF16),
    DecodeShape(2, 2, 80, 80, INT8),
)


class Sizes:
    """Kernels that do nothing, and what they were launched with."""

    def __init__(self) -> None:
        self.launched: list[tuple[str, tuple[int, ...]]] = []

    def get(self, source: str, name: str, macros: Macros = ()) -> Kernel:
        def launch(
            grid: Sequence[int], block: Sequence[int], arguments: Sequence[Argument], *, shared_bytes: int = 0
        ) -> None:
            self.launched.append((name, tuple(grid)))

        return launch


# Numbers


@pytest.mark.parametrize("arch", [600, 610])
@pytest.mark.parametrize("kv_type", KV_TYPES, ids=str)
def test_all_types(kv_type: torch.dtype, arch: int) -> None:
    case = make_case(replace(PLAIN, kv_type=kv_type), 2, 45, starts=[0, 11], with_sinks=True)
    for order in (1, 2):
        kernels = HostKernels(order, arch)
        for splits in (1, 3):
            case.check(case.run(kernels, splits))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 33, 130])
def test_all_shapes(shape: DecodeShape, length: int) -> None:
    case = make_case(shape, 1, length, scale_type=F16)
    for splits in (1, 2):
        case.check(case.run(HostKernels(order=2), splits))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_whatever_is_asked_for(data: st.DataObject) -> None:
    shape = data.draw(st.sampled_from(SHAPES), "shape")
    batch, length = data.draw(st.integers(1, 3), "batch"), data.draw(st.integers(1, 90), "length")
    shape = replace(
        shape, window=data.draw(st.sampled_from((0, 0, 1, 7, 64)), "window"),
        softcap=data.draw(st.sampled_from((0.0, 0.0, 3.0)), "softcap"),
        scale=data.draw(st.sampled_from((None, 0.25)), "scale"),
    )  # fmt: skip
    draw = torch.Generator().manual_seed(data.draw(st.integers(0, 1000), "seed"))
    starts = data.draw(st.none() | st.lists(st.integers(0, length), min_size=batch, max_size=batch), "starts")
    mask = _mask(data.draw(st.sampled_from(("", "bool", *map(str, ROUNDING))), "mask"), batch, length, draw)
    types: dict[str, Any] = dict(
        query_type=data.draw(st.sampled_from((None, *ROUNDING)), "query_type"),
        scale_type=data.draw(st.sampled_from((F16, F32)), "scale_type"),
    )
    sinks = data.draw(st.booleans(), "sinks")
    case = make_case(shape, batch, length, starts=starts, mask=mask, with_sinks=sinks, **types)
    order, arch = data.draw(st.integers(0, 9), "order"), data.draw(st.sampled_from((600, 610)), "arch")
    case.check(case.run(HostKernels(order, arch), data.draw(st.none() | st.integers(1, 9), "splits")))


def _mask(kind: str, batch: int, length: int, draw: torch.Generator) -> torch.Tensor | None:
    """With holes; one for all sequences where there are two."""
    if not kind:
        return None
    seen = torch.rand(batch if batch != 2 else 1, length, generator=draw) < 0.7
    if kind == "bool":
        return seen
    dtype = next(each for each in ROUNDING if str(each) == kind)
    return torch.randn(seen.shape, generator=draw).to(dtype).masked_fill(~seen, torch.finfo(dtype).min)


@numbers_only
def test_the_order_of_threads_and_blocks_changes_no_bit() -> None:
    case = make_case(replace(PLAIN, kv_type=F32), 2, 130, starts=[0, 50], with_sinks=True)
    for splits in (1, 2, 5):
        first, *others = (case.run(HostKernels(order), splits) for order in (*ORDERS, 4, 5))
        assert all(torch.equal(first, other) for other in others)


@numbers_only
def test_the_number_of_splits_changes_roundings_only() -> None:
    case = make_case(replace(PLAIN, kv_type=F32), 2, 130, starts=[3, 100])
    for splits in (1, 2, 3, 7, 128):
        case.check(case.run(HostKernels(), splits))


def test_sharp_and_large_logits() -> None:
    """Logits of thousands: one position has all the weight, however the positions are divided."""
    case = make_case(replace(PLAIN, kv_type=F32), 1, 70)
    best = torch.tensor([3, 68])
    query = torch.zeros_like(case.query)
    query[..., 0] = 1e3
    case.keys[..., 0] = torch.linspace(-1, 1, 70)
    for kv, at in enumerate(best):
        case.keys[0, kv, at, 0] = 9.0
    expected = case.values[0, torch.arange(2), best].repeat_interleave(3, 0)
    for splits in (1, 2, 5):
        assert torch.equal(replace(case, query=query).run(HostKernels(), splits)[0], expected)


# Where keys and values lie


@pytest.mark.parametrize("kv_type", [F16, INT8], ids=str)
def test_strides(kv_type: torch.dtype) -> None:
    shape = replace(PLAIN, kv_type=kv_type)
    case = make_case(shape, 2, 37)
    expected = case.run(HostKernels(), 2)
    for where in (_by_position, _in_a_longer_buffer):
        moved = {name: where(each) if name.endswith("scales") else each for name, each in case.options.items()}
        other = Case(shape, _by_position(case.query), where(case.keys), where(case.values), moved)
        if kv_type == INT8 and where is _by_position:
            other.options.update(case.options)  # their last stride has to be 1
        assert not other.keys.is_contiguous() and torch.equal(other.run(HostKernels(), 2), expected)


def _by_position(tensor: torch.Tensor) -> torch.Tensor:
    """With the first two dimensions the other way round in memory."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def _in_a_longer_buffer(tensor: torch.Tensor) -> torch.Tensor:
    """As caches that keep room do it; the room holds NaN."""
    room = torch.full((*tensor.shape[:2], 64, *tensor.shape[3:]), float("nan") if tensor.is_floating_point() else 127)
    room = room.to(tensor.dtype)
    room[:, :, : tensor.shape[2]] = tensor
    return room[:, :, : tensor.shape[2]]


@pytest.mark.skipif(
    "address" in os.environ.get(SANITIZE, ""), reason="2 GiB are more than the sanitizer's shadow likes"
)
def test_offsets_beyond_32_bits() -> None:
    shape = replace(PLAIN, kv_type=INT8)
    case = make_case(shape, 2, 5)
    room = torch.empty((1 << 31) + (1 << 16), dtype=torch.int8)  # hardly touched, so hardly there
    far = []
    for offset, rows in ((0, case.keys), (1 << 14, case.values)):
        view = room[offset:].as_strided(rows.shape, (1 << 31, 40 * 5, 40, 1))
        view.copy_(rows)
        far.append(view)
    keys, values = far
    found = Case(shape, case.query, keys, values, case.options).run(HostKernels())
    assert torch.equal(found, case.run(HostKernels()))


@pytest.mark.parametrize("kv_type", [F32, BF16, INT8], ids=str)
def test_what_is_not_seen_is_not_read(kv_type: torch.dtype) -> None:
    mask = torch.ones(2, 60, dtype=torch.bool)
    mask[0, 30:40] = False
    case = make_case(replace(PLAIN, kv_type=kv_type, window=50), 2, 60, starts=[3, 25], mask=mask)
    expected = case.run(HostKernels(), 2)
    unseen = ~(case.seen() & mask)
    assert unseen[0].sum() == 20 and unseen[1].sum() == 25
    garbage = float("nan") if kv_type != INT8 else 127
    for tensor in (case.keys, case.values):
        tensor.permute(0, 2, 1, 3)[unseen] = garbage
    for name in ("key_scales", "value_scales"):
        if name in case.options:
            case.options[name].permute(0, 2, 1)[unseen] = float("nan")
    assert torch.equal(case.run(HostKernels(), 2), expected)


def test_what_is_seen_and_no_number_is_told() -> None:
    case = make_case(PLAIN, 1, 40)
    case.keys[0, 0, 17, 5] = float("nan")
    for splits in (1, 2):
        found = case.run(HostKernels(), splits)
        assert found[0, :3].isnan().all() and not found[0, 3:].isnan().any()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_sequence_that_sees_nothing_gives_nothing(with_sinks: bool) -> None:
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[2] = False
    case = make_case(PLAIN, 3, 20, starts=[0, 20, 0], mask=mask, with_sinks=with_sinks)
    for splits in (1, 4):
        found = case.run(HostKernels(), splits)
        case.check(found)
        assert found[0].any() and not found[1:].any()


# The launcher


@given(st.integers(1, 64), st.integers(1, 64), st.integers(1, 40000), st.integers(0, 5000), st.integers(1, 132))
@settings(max_examples=200, deadline=None)
def test_splits_fill_the_card(batch: int, group: int, length: int, window: int, multiprocessors: int) -> None:
    kernels = Sizes()
    attention = DecodeAttention(kernels, DecodeShape(2 * group, 2, 64, 64, F16, window=window), multiprocessors)
    splits = attention.splits(batch, length)
    blocks = splits * batch * 2 * attention.shape.head_blocks
    assert splits == 1 or blocks <= 2 * multiprocessors and min(length, window or length) >= 64 * splits
    full = splits == 128 or blocks + batch * 2 * attention.shape.head_blocks > 2 * multiprocessors
    assert full or min(length, window or length) < 64 * (splits + 1)


@given(st.integers(1, 200))
def test_every_query_head_has_a_place(group: int) -> None:
    shape = DecodeShape(group, 1, 64, 64, F16)
    macros = dict(shape.macros)
    assert macros["HEADS"] <= 8 and macros["TILES"] in (1, 2, 4)
    places = macros["HEADS"] * macros["TILES"]
    assert (shape.head_blocks - 1) * places < group <= shape.head_blocks * places


def test_one_launch_where_one_split_is_enough() -> None:
    for length, names in ((100, ["attend"]), (300, ["attend", "combine"])):
        kernels = Sizes()
        make_case(PLAIN, 1, length).run(kernels)
        assert [name for name, _ in kernels.launched] == names


def test_the_workspace_is_as_large_as_said() -> None:
    case = make_case(PLAIN, 2, 150, with_sinks=True)
    attention = DecodeAttention(HostKernels(), PLAIN, 30)
    assert attention.workspace_size(2, 40) == 0 and attention.splits(2, 150) == 2
    size = attention.workspace_size(2, 150)
    room = torch.full((size + 8,), 7.0)
    found = attention(case.query, case.keys, case.values, workspace=room, **case.options)
    case.check(found)
    assert size == 2 * 6 * 2 * 42 and not (room[:size] == 7.0).any() and (room[size:] == 7.0).all()
    with pytest.raises(ValueError, match=f"{size} contiguous numbers of torch.float32 are needed"):
        attention(case.query, case.keys, case.values, workspace=room[: size - 1])


def test_variants_are_what_the_launcher_asks_for() -> None:
    names = {"KV_TYPE", "D", "DV", "HEADS", "TILES"}
    assert all(set(dict(macros)) == names for macros in VARIANTS[SOURCE])
    for shape in (
        DecodeShape(32, 4, 128, 128, F16),
        DecodeShape(64, 4, 128, 128, BF16),
        DecodeShape(64, 8, 64, 64, F16),
    ):
        assert shape.macros in VARIANTS[SOURCE]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(head_size=12), "head_size is 12; the kernel takes multiples of 8 up to 256"),
        (dict(value_size=264), "value_size is 264"),
        (dict(head_size=0), "head_size is 0"),
        (dict(q_heads=7), "7 query heads do not divide among 2 heads of keys"),
        (dict(kv_heads=0), "6 query heads do not divide among 0"),
        (dict(kv_type=torch.float64), "keys and values of torch.float64"),
        (dict(window=-1), "window -1"),
    ],
)
def test_shapes_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PLAIN, **change)


def _bad(name: str, case: Case) -> Case:
    options = dict(case.options)
    query, keys, values = case.query, case.keys, case.values
    match name:
        case "query":
            query = query[:, :5]
        case "query type":
            query = query.double()
        case "query stride":
            query = query.transpose(1, 2).contiguous().transpose(1, 2)
        case "empty":
            keys = keys[:, :, :0]
        case "keys":
            keys = keys[..., :32]
        case "values":
            values = values.to(F32)
        case "values length":
            values = values[:, :, 1:]
        case "unaligned":
            keys = torch.zeros(keys.numel() + 1, dtype=F16)[1:].view(keys.shape)
        case "row stride":
            keys = torch.zeros(2, 2, 9, 44, dtype=F16)[..., :40]
        case "mask":
            options["mask"] = torch.ones(2, 8, dtype=torch.bool)
        case "mask type":
            options["mask"] = torch.ones(2, 9, dtype=torch.int32)
        case "starts":
            options["starts"] = torch.zeros(2, dtype=torch.int64)
        case "sinks":
            options["sinks"] = torch.zeros(2)
        case "scales":
            options["key_scales"] = options["value_scales"] = torch.ones(2, 2, 9)
    return Case(case.shape, query, keys, values, options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("query", r"query is torch.float16 \[2, 5, 40\]; \[B, Hq, D\] = \[2, 6, 40\]"),
        ("query type", "query is torch.float64"),
        ("query stride", "query is "),
        ("empty", "with some B and T is wanted"),
        ("keys", r"keys are torch.float16 \[2, 2, 9, 32\]; torch.float16 \[2, 2, 9, 40\] is wanted"),
        ("values", "values are torch.float32"),
        ("values length", r"values are torch.float16 \[2, 2, 8, 40\]"),
        ("unaligned", "keys with strides .* are not `aligned`; copy them"),
        ("row stride", "are not `aligned`"),
        ("mask", r"mask is torch.bool \[2, 8\]; \[2, 9\] or \[1, 9\]"),
        ("mask type", "mask is torch.int32"),
        ("starts", r"starts are torch.int64 \[2\]; torch.int32 \[2\] is wanted"),
        ("sinks", r"sinks are torch.float32 \[2\]; torch.float32 \[6\]"),
        ("scales", "int8 keys and values need scales, others have none"),
    ],
)
def test_tensors_that_are_refused(name: str, message: str) -> None:
    kernels = Sizes()
    case = _bad(name, make_case(PLAIN, 2, 9))
    with pytest.raises(ValueError, match=message):
        case.run(kernels)
    assert not kernels.launched


@pytest.mark.parametrize("wrong", ["none", "one", "shape", "type", "two types"])
def test_scales_that_are_refused(wrong: str) -> None:
    case = make_case(replace(PLAIN, kv_type=INT8), 2, 9)
    options: dict[str, Any] = {
        "none": {},
        "one": dict(key_scales=torch.ones(2, 2, 9)),
        "shape": dict.fromkeys(case.options, torch.ones(2, 2, 8)),
        "type": dict.fromkeys(case.options, torch.ones(2, 2, 9, dtype=BF16)),
        "two types": dict(key_scales=torch.ones(2, 2, 9), value_scales=torch.ones(2, 2, 9, dtype=F16)),
    }[wrong]
    with pytest.raises(ValueError, match="scales"):
        replace(case, options=options).run(Sizes())


def test_rows_of_one_position_may_have_any_stride() -> None:
    rows = torch.zeros(1, 2, 9, 40, dtype=F16)
    assert aligned(rows) and aligned(rows[:, :, :1].as_strided((1, 2, 1, 40), (3, 360, 7, 1)))
    assert not aligned(rows.as_strided((1, 2, 2, 40), (3, 160, 41, 1)))


# Planted bugs

BUGS = {
    "a barrier is missing": (
        "        }\n        __syncthreads();\n    }\n\n    for",
        "        }\n    }\n\n    for",
    ),
    "the last position": ("from + share < of.length ? from + share", "from + share < of.length ? from + share - 1"),
    "the window": ("begin = of.length - of.window;", "begin = of.length - of.window - 1;"),
    "the padding": ("int begin = starts ?", "int begin = starts && 0 ?"),
    "one sequence's mask for all": ("batch * of.mask_batch + at", "at"),
    "what is hidden is read": ("if (seen && chunk < DV)", "if (at < of.length && chunk < DV)"),
    "no new largest logit": ("factor[head] = exp2f(top[head] - highest)", "factor[head] = 1.0f"),
    "weights of other loads": ("row * LANES + own_load(load)", "row * LANES + load"),
    "the sink": ("sum * factor + exp2f(sink - higher)", "sum * factor"),
    "rows are not joined": ("step = LANES; step < 32", "step = LANES; step < 16"),
    "sums of splits": ("+ 1] * exp2f(states[2 * i * step] - top)", "+ 1]"),
    "another head's keys": ("blockIdx.y % of.kv_heads, first", "0, first"),
    "a divergent warp": ("if (!__any_sync(FULL_MASK, any)) continue;", "if (!any) continue;"),
}


@numbers_only
@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    text, (right, wrong) = read_source(SOURCE), BUGS[bug]
    assert text.count(right) == 1
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, 40:48] = False
    case = make_case(replace(PLAIN, window=66), 2, 70, starts=[0, 21], mask=mask, with_sinks=True)
    case.keys[..., 0] *= torch.linspace(0.1, 3, 70).to(F16)  # logits grow: the largest changes
    case.values.permute(0, 2, 1, 3)[~(case.seen() & mask)] = float("nan")
    found = 0
    for order in ORDERS:
        for splits in (1, 2):
            case.check(case.run(HostKernels(order), splits))
            try:
                case.check(case.run(HostKernels.of_text(text.replace(right, wrong), order), splits))
            except (AssertionError, KernelError):
                found += 1
    assert found
