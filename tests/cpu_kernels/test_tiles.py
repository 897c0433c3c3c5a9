"""Products through tiles: emulated ones here, the instructions as far as their assembly says."""

import json
import logging
import os
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moe_offload.cpu_kernels import Activation, ThreadTeam, amx, group_tokens, packed_experts
from moe_offload.cpu_kernels.emit import VOID, Emitter, Value, ir, micro_kernel
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.packed_experts import PackedExpertKernel
from moe_offload.cpu_kernels.packed_layout import ExpertRecord, PackedMatrix
from moe_offload.cpu_kernels.packing import pack_matrix
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.tiles import TileShape, configuration, open_tiles

ROOT = Path(__file__).parents[2]
FORMATS = [(dtype, group) for dtype in ("int8", "int4") for group in (32, 64, 128)] + [("mxfp4", 32)]
x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="names of x86-64 CPUs")


def test_configuration_is_the_operand_of_ldtilecfg() -> None:
    found = configuration((TileShape(16, 64), TileShape(5, 12)))
    assert len(found) == 64
    assert found[0] == 1 and found[1] == 0  # palette, start row
    assert found[16:20] == bytes([64, 0, 12, 0]) and found[48:50] == bytes([16, 5])
    assert not any(found[2:16]) and not any(found[20:48]) and not any(found[50:])


@pytest.mark.parametrize(("m", "k", "n"), [(16, 16, 16), (16, 8, 16), (5, 3, 7), (1, 1, 1)])
def test_an_emulated_tile_does_what_the_instruction_is_defined_to_do(m: int, k: int, n: int) -> None:
    """Tiles of m x 4k, k x 4n and m x n: two products, the second one without clearing the total."""
    shapes = (TileShape(m, 4 * n), TileShape(m, 4 * k), TileShape(k, 4 * n))

    def emit(em: Emitter, a: Value, b: Value, total: Value) -> None:
        tiles = open_tiles("emulated", em, shapes)
        tiles.load(0, total, 80)
        tiles.load(1, a, 96)
        tiles.load(2, b, 64)
        tiles.dot(0, 1, 2)
        tiles.dot(0, 1, 2)
        tiles.store(0, total, 80)
        tiles.zero(0)
        tiles.store(0, em.add(total, 16 * 80), 80)

    work = micro_kernel(f"tile_test_{m}_{k}_{n}", "iii:v", emit)

    def job(a: int, b: int, total: int) -> None:
        work(a, b, total)

    rng = np.random.default_rng(0)
    a = rng.integers(-128, 128, (16, 96)).astype(np.int8)
    b = rng.integers(-128, 128, (16, 64)).astype(np.int8)
    total = rng.integers(-1000, 1000, (32, 20)).astype(np.int32)
    wanted = total.copy()
    fours = b[:k, : 4 * n].reshape(k, n, 4).astype(np.int32)
    wanted[:m, :n] += 2 * np.einsum("mki,kni->mn", a[:m, : 4 * k].reshape(m, k, 4).astype(np.int32), fours)
    wanted[16 : 16 + m, :n] = 0
    compiled = compile_job(job, "void(int64,int64,int64)", f"tile-test-{m}-{k}-{n}")
    compiled.ctypes(a.ctypes.data, b.ctypes.data, total.ctypes.data)
    np.testing.assert_array_equal(total, wanted)


@pytest.mark.parametrize("weights", [TileShape(8, 64), TileShape(16, 32)])
def test_tiles_that_do_not_fit_together_are_refused(weights: TileShape) -> None:
    """A CPU would take their product for an invalid instruction."""
    function = ir.Function(ir.Module(), ir.FunctionType(VOID, []), "work")
    em = Emitter(ir.IRBuilder(function.append_basic_block()), current_target())
    tiles = open_tiles("hardware", em, (TileShape(16, 64), TileShape(16, 64), weights))
    with pytest.raises(AssertionError):
        tiles.dot(0, 1, 2)


@pytest.mark.skipif(not current_target().fma, reason="bits differ where f32 sums are rounded twice")
@pytest.mark.parametrize(("dtype", "group"), FORMATS)
@pytest.mark.parametrize("planes", [1, 2])
def test_tiles_and_vectors_agree_bit_for_bit(dtype: str, group: int, planes: int) -> None:
    span = PackedMatrix(32, group, dtype, group).span  # type: ignore[arg-type]
    for tokens in (1, 2, 15, 16, 17, 31, 32):
        for records in (1, 2, 5):
            layout = PackedMatrix(32, records * span - 3, dtype, group)  # type: ignore[arg-type]
            by_tiles, by_vectors = amx.compare(layout, planes, tokens, "emulated", seed=tokens)
            assert np.isfinite(by_vectors).all() and by_vectors.any()
            assert by_tiles.tobytes() == by_vectors.tobytes()


def _experts(record: ExpertRecord, count: int) -> tuple[NDArray[np.int64], list[NDArray[np.uint8]]]:
    """Random experts: their table, and the memory behind it."""
    rng = np.random.default_rng(3)
    table, memory = np.zeros((count, 6), np.int64), []
    for e in range(count):
        stored = np.zeros(record.nbytes, np.uint8)
        matrices = (record.up_matrix, record.up_matrix, record.down_matrix)
        for column, (matrix, offset) in enumerate(zip(matrices, record.offsets, strict=False)):
            weights = rng.standard_normal((matrix.rows, matrix.cols)) / 8
            pack_matrix(weights.astype(np.float32), matrix, stored[offset : offset + matrix.nbytes])
            table[e, column] = stored.ctypes.data + offset
        memory.append(stored)
    return table, memory


@pytest.mark.skipif(not current_target().byte_dot, reason="tiles come with activations in planes")
@pytest.mark.parametrize("activations", ["auto", "int16"])
def test_a_layer_gives_the_same_bits_with_tiles(activations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 to 70 tokens: all have expert 0, and 1 or 2 in turn. With many tokens auto takes one plane, int16 two."""
    record = ExpertRecord(200, 150, "int8", group=64)
    table, _memory = _experts(record, 3)
    kernels = []
    for mode in (None, "emulated"):
        monkeypatch.setattr(packed_experts, "tile_mode", lambda *_, mode=mode: mode)
        kernels.append(PackedExpertKernel(record, Activation("silu"), activations))
    rng = np.random.default_rng(4)
    with ThreadTeam(2) as team:
        for tokens in (1, 4, 5, 16, 17, 32, 33, 49, 64, 65, 70):
            index = np.stack([np.zeros(tokens, np.int64), 1 + np.arange(tokens) % 2], axis=1)
            groups = group_tokens(index, rng.random((tokens, 2)).astype(np.float32), 3)
            hidden = rng.standard_normal((tokens, 200)).astype(np.float32)
            broken = np.arange(tokens) == 20  # among many tokens alone
            hidden[broken, 7] = np.nan
            outs = [np.zeros_like(hidden) for _ in kernels]
            for kernel, out in zip(kernels, outs, strict=True):
                kernel(table, groups, hidden, out, team)
            assert outs[0].any() and np.isfinite(outs[0][~broken]).all()
            assert outs[0][~broken].tobytes() == outs[1][~broken].tobytes()
            assert all(np.isnan(out[broken]).all() for out in outs)


@pytest.mark.parametrize(
    ("on_cpu", "granted", "agrees", "expected"),
    [
        (True, True, True, "hardware"),
        (True, True, False, None),
        (True, False, True, None),
        (False, True, True, None),
    ],
)
def test_tiles_need_the_cpu_permission_and_equal_bits(
    on_cpu: bool, granted: bool, agrees: bool, expected: str | None,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    target = replace(current_target(), tiles=on_cpu)
    checked: list[Any] = []

    def agree(*arguments: Any) -> bool:
        checked.append(arguments)
        return agrees

    monkeypatch.setattr(amx, "current_target", lambda: target)
    monkeypatch.setattr(amx, "permission", lambda: granted)
    monkeypatch.setattr(amx, "tiles_agree", agree)
    amx._sound.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert amx.tile_mode("int4", 32, "planes") == expected
    assert bool(checked) == (on_cpu and granted)
    assert ("without AMX" in caplog.text) == (on_cpu and granted and not agrees)
    assert amx.tile_mode("int4", 32, "exact") is None
    amx._sound.cache_clear()


def test_asking_for_permission_is_harmless() -> None:
    assert amx.permission() in (True, False)


@pytest.mark.parametrize(("dtype", "group"), FORMATS)
def test_real_tiles(dtype: str, group: int) -> None:
    if amx.tile_mode(dtype, group, "planes") is None:
        pytest.skip("no AMX here, or no permission to use it")
    for planes in (1, 2):
        for tokens in (1, 16, 17, 32):
            layout = PackedMatrix(32, 5 * group, dtype, group)  # type: ignore[arg-type]
            assert amx.tiles_agree(layout, planes, tokens, "hardware")


# Compiles, and executes nothing of it.
SCRIPT = """
import json
import sys
from moe_offload.cpu_kernels import amx
from moe_offload.cpu_kernels.jit import native
from moe_offload.cpu_kernels.kernel_cache import compile_job
from moe_offload.cpu_kernels.packed_layout import PackedMatrix
from moe_offload.cpu_kernels.panel import make_panel
from moe_offload.cpu_kernels.target import current_target
from moe_offload.cpu_kernels.tile_product import make_products

target = current_target()
layout = PackedMatrix(32, 64, "int4", 64)
if target.tiles:
    job = amx.make_comparison(layout, 2, "hardware", target)
else:
    amx.permission = lambda: sys.exit("nobody may ask for tiles that the CPU has not")
    one = make_panel(layout, "planes", 1, 1, target)
    product = lambda block, records, rows, tokens, planes, padded, to, step: one(block, records, rows, padded, to, step)
    products = make_products("assembly", layout, native(product), amx.tile_mode("int4", 64, "planes"))
    begin, multiply, end = products

    def job(block, records, rows, tokens, planes, padded, to, panels):
        begin(rows, tokens, planes, padded, panels)
        multiply(block, records, rows, tokens, planes, padded, to, 128, panels)
        end(tokens)

compiled = compile_job(job, f"void({','.join(['int64'] * 8)})", "assembly")
print(json.dumps([target.tiles, compiled._library.get_asm_str()]))
"""
_INSTRUCTIONS = re.compile(r"\b(ldtilecfg|tilezero|tileloadd|tdpbssd|tilestored|tilerelease)\b")


def _assembly(cpu: str, features: str, folder: Path) -> tuple[bool, str]:
    # an empty cache of its own: Numba keeps no assembly of what it loads
    environment = {**os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features, "NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=ROOT, env=environment, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    tiles, assembly = json.loads(done.stdout)
    return tiles, assembly


@x86_only
def test_assembly_of_real_tiles(tmp_path: Path) -> None:
    tiles, assembly = _assembly("sapphirerapids", "+amx-tile,+amx-int8", tmp_path)
    assert tiles
    found = _INSTRUCTIONS.findall(assembly)
    # the configuration comes first; whatever path is taken behind the tiles, they are released at its end
    assert found[0] == "ldtilecfg" and found.count("ldtilecfg") == 1
    releases = found.count("tilerelease")
    assert releases and set(found[-releases:]) == {"tilerelease"}
    # for each plane, with more than 16 tokens four products, else two: the only level of tiles with groups of 64
    assert found.count("tdpbssd") == 12 and found.count("tileloadd") == 14 and found.count("tilestored") == 12
    defined = set(re.findall(r"^([\w.$]+):", assembly, re.MULTILINE))
    wanted = set(re.findall(r"movabsq\s+\$([A-Za-z_.][\w.$]*)", assembly))
    wanted |= set(re.findall(r"\b(?:callq?|jmp)\s+([A-Za-z_][\w.$]*)", assembly))
    assert wanted <= defined, wanted - defined


@x86_only
@pytest.mark.parametrize(("cpu", "features"), [("haswell", ""), ("sapphirerapids", "+amx-tile")])
def test_no_tile_instruction_where_the_cpu_lacks_them(cpu: str, features: str, tmp_path: Path) -> None:
    tiles, assembly = _assembly(cpu, features, tmp_path)
    assert not tiles
    assert assembly and not _INSTRUCTIONS.search(assembly) and "%tmm" not in assembly
