"""The text that compilers are given: a source with its headers in it."""

from pathlib import Path

import pytest

from moe_offload.gpu_kernels import sources


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(f"{sources.__name__}.resources.files", lambda package: tmp_path)
    sources.read_source.cache_clear()
    return tmp_path


def test_each_header_stands_in_the_text_once(folder: Path) -> None:
    (folder / "a.cuh").write_text("int a;\n")
    (folder / "b.cuh").write_text('#include "a.cuh"\nint b;\n')
    (folder / "k.cu").write_text('// first\n#include "b.cuh"\n#include "a.cuh"\nint k;\n')
    try:
        lines = sources.read_source("k.cu").splitlines()
    finally:
        sources.read_source.cache_clear()
    assert [line for line in lines if line and not line.startswith("#line")] == [
        "// first",
        "int a;",
        "int b;",
        "int k;",
    ]


def test_a_fault_is_told_by_the_line_of_its_own_file(folder: Path) -> None:
    (folder / "a.cuh").write_text("\n\nfault in a\n")
    (folder / "k.cu").write_text('\n#include "a.cuh"\n\nfault in k\n')
    try:
        text = sources.read_source("k.cu")
    finally:
        sources.read_source.cache_clear()
    assert places(text) == {"fault in a": ("a.cuh", 3), "fault in k": ("k.cu", 4)}


def places(text: str) -> dict[str, tuple[str, int]]:
    """Where a compiler says that each line is."""
    found, name, number = {}, "", 0
    for line in text.splitlines():
        if line.startswith("#line"):
            name, number = line.split('"')[1], int(line.split()[1]) - 1
        elif line:
            found[line] = name, number
        number += 1
    return found


def test_a_header_that_is_missing(folder: Path) -> None:
    (folder / "k.cu").write_text('#include "nothing.cuh"\n')
    with pytest.raises(FileNotFoundError, match="nothing.cuh"):
        sources.read_source("k.cu")


@pytest.mark.parametrize("name", sources.source_names())
def test_sources_need_no_header_of_cuda(name: str) -> None:
    """Its wheel with headers need not be installed, and CuPy's key of compiled kernels has the whole text."""
    text = sources.read_source(name)
    assert "#include" not in text and 'extern "C" __global__' in text
