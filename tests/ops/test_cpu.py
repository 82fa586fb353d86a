"""The compiled passes of the CPU backend: that they are there, what they refuse, and that threads change no meaning."""

from __future__ import annotations

import shutil
from array import array

import pytest
import torch
from torch import Tensor

from gradguide.ops import Row, Write, cpu, foreach, reference

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler on this machine")


def rows_of(*lists: list[Tensor]) -> list[Row | None]:
    return [Row(offset=tensors) for tensors in lists]


def large(seed: int) -> list[Tensor]:
    """More elements than a single thread takes, in tensors that the ranges of threads cut."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((300, 1001), (7,), (), (0, 4), (90, 777))]


@needs_compiler
def test_the_compiled_passes_are_installed() -> None:
    assert cpu._cpu is not None, "the extension was not built although there is a compiler; reinstall and read its log"


def test_float32_rows_take_the_compiled_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu._cpu is None:
        pytest.skip("the extension is not built")
    monkeypatch.setattr(foreach, "gram", None)
    monkeypatch.setattr(foreach, "combine_", None)
    g = [torch.ones(3)]
    assert cpu.gram(rows_of(g)).tolist() == [[[3.0]]]
    cpu.combine_(rows_of(g), [Write(into=g, coefficients=torch.tensor([[2.0]]))])
    assert g[0].tolist() == [2.0, 2.0, 2.0]


def test_without_the_extension_the_portable_backend_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (rows_of(large(0), large(1)) for _ in range(2))
    coefficients = torch.tensor([[0.5, -2.0]], dtype=torch.float64)
    with_extension = cpu.gram(first)
    cpu.combine_(first, [Write(into=first[0].tensors, coefficients=coefficients)])  # type: ignore[union-attr]
    monkeypatch.setattr(cpu, "_cpu", None)
    assert torch.allclose(cpu.gram(second), with_extension, rtol=1e-5, atol=1e-2)
    cpu.combine_(second, [Write(into=second[0].tensors, coefficients=coefficients)])  # type: ignore[union-attr]
    for a, b in zip(first[0].tensors, second[0].tensors, strict=True):  # type: ignore[union-attr]
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_threads_share_the_elements(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_threads", lambda lengths: threads)
    rows = rows_of(large(0), large(1))
    found = cpu.gram(rows)
    assert torch.allclose(found, reference.gram(rows), rtol=1e-5, atol=1e-2)
    assert torch.equal(found, cpu.gram(rows)), "the same number of threads gives the same bits"
    into, expected = ([torch.zeros_like(t) for t in large(0)] for _ in range(2))
    coefficients = torch.tensor([[2.0, 1.0]])
    cpu.combine_(rows, [Write(into=into, coefficients=coefficients)])
    reference.combine_(rows, [Write(into=expected, coefficients=coefficients)])
    for a, b in zip(into, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)


def test_the_compiled_passes_refuse_tables_that_do_not_fit() -> None:
    if cpu._cpu is None:
        pytest.skip("the extension is not built")
    table, kinds, lengths = array("q", [0] * 4), bytes(4), array("q", [0])
    with pytest.raises(ValueError, match="1 to 20 rows of 1 tensors, found 2 rows in 32 bytes"):
        cpu._cpu.gram(table, kinds, lengths, 2, 1, bytes(2))
    with pytest.raises(ValueError, match="1 to 20 rows"):
        cpu._cpu.gram(array("q"), b"", lengths, 0, 1, b"")
    with pytest.raises(ValueError, match="kinds must have 4 bytes for each of 1 rows, found 3"):
        cpu._cpu.gram(table, bytes(3), lengths, 1, 1, bytes(1))
    with pytest.raises(ValueError, match=r"threads must be in \[1, 256\], found 0"):
        cpu._cpu.gram(table, kinds, lengths, 1, 0, bytes(1))
    with pytest.raises(ValueError, match="at most 4 writes"):
        cpu._cpu.combine(table, kinds, lengths, 1, 1, array("q"), array("d", [1.0]), b"\0", b"\0")
    with pytest.raises(ValueError, match="and a kind"):
        cpu._cpu.combine(table, kinds, lengths, 1, 1, array("q", [0]), array("d", [1.0]), b"\0", b"")


def test_rows_of_other_sizes_are_refused_before_memory_is_read() -> None:
    if cpu._cpu is None:
        pytest.skip("the extension is not built")
    g, short = [torch.ones(1000)], [torch.ones(4)]
    with pytest.raises(ValueError, match="differ in size"):
        cpu.gram(rows_of(g, short))
    with pytest.raises(ValueError, match="differ in size"):
        cpu.combine_(rows_of(g, g), [Write(into=short, coefficients=torch.tensor([[1.0, 1.0]]))])
    assert short[0].tolist() == [1.0] * 4
