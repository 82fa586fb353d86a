"""Sources in 8 bits, and in the host's memory."""

from __future__ import annotations

import weakref
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gradguide import Alignment, GradGuide, SourceGradient
from gradguide.description import describe
from gradguide.ops import Row
from gradguide.ops.tensors import Tensors
from tests.contract import kit
from tests.integrations import lora


def fixed(seed: int = 7) -> SourceGradient:
    return kit.source_of(kit.net(), seed=seed, moving=False)


def flat(row: Row) -> torch.Tensor:
    return torch.cat([row.value(index, torch.float64) for index in range(len(row.tensors))])


@lora.QUIET
def test_the_cosine_of_a_real_gradient_with_itself_in_8_bits() -> None:
    """Of a language model's adapter: magnitudes differ much from element to element."""
    model = lora.llama()
    lora.move(model)
    ids = torch.randint(3, 40, (8, 7), generator=torch.Generator().manual_seed(0))

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    whole = SourceGradient.capture(model, ids.split(2), loss, curvature=False)
    codes = SourceGradient.capture(model, ids.split(2), loss, curvature=False, dtype=torch.int8)
    at = [p for p in model.parameters() if p.requires_grad]
    a, b = flat(whole.row(whole.names(), at)), flat(codes.row(codes.names(), at))
    assert 1 - float(torch.dot(a, b) / (a.norm() * b.norm())) < 1e-3
    assert "8 bits" in repr(codes)


def test_bytes_per_number() -> None:
    big = SourceGradient({"w": torch.randn(1000, 1280)})
    codes = big.quantized()
    stored = sum(t.numel() * t.element_size() for table in codes._tables.values() for t in table.values())
    assert 16 * stored / 1_280_000 <= 16.5
    assert codes.quantized() is codes


def test_a_step_with_8_bits_is_that_of_what_they_decode_to() -> None:
    model, twin = kit.net(), kit.net()
    codes = fixed().quantized()
    names = codes.names()
    row = codes.row(names, list(model.parameters()))
    shapes = [p.shape for p in model.parameters()]
    decoded = {n: row.value(i, torch.float32).view(shapes[i]) for i, n in enumerate(names)}
    for each, source in ((model, codes), (twin, SourceGradient(decoded))):
        optimizer = GradGuide(
            kit.adamw(each.parameters()), alignment=Alignment(source, weight=0.5), names=each.named_parameters()
        )
        kit.train(each, optimizer, range(5))
    torch.testing.assert_close(kit.parameters_of(model), kit.parameters_of(twin), rtol=1e-5, atol=1e-6)


def test_files_keep_8_bits(tmp_path: Path) -> None:
    codes = fixed().quantized()
    codes.save(tmp_path / "codes.safetensors")
    fixed().save(tmp_path / "whole.safetensors")
    loaded = SourceGradient.load(tmp_path / "codes.safetensors")
    assert loaded.fingerprint() == codes.fingerprint()
    told, whole = (describe(tmp_path / f"{name}.safetensors") for name in ("codes", "whole"))
    assert told["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-2)
    assert told["bytes"] < whole["bytes"]


def test_what_8_bits_do_not_keep() -> None:
    moving = kit.source_of(kit.net())
    with pytest.raises(ValueError, match="found curvature; keep such a source"):
        moving.quantized()
    with pytest.raises(ValueError, match=r"int8 keeps s0 alone; give curvature=False"):
        SourceGradient.capture(kit.net(), [], lambda m, b: torch.zeros(()), dtype=torch.int8)
    with pytest.raises(TypeError, match="must hold 8-bit codes beside steps"):
        SourceGradient({"w": torch.ones(3)}, steps={"w": torch.ones(1)})
    with pytest.raises(ValueError, match="steps must have the names and shapes"):
        SourceGradient({"w": torch.ones(300, dtype=torch.int8)}, steps={"w": torch.ones(1)})
    with pytest.raises(ValueError, match="steps must be at least 0"):
        SourceGradient({"w": torch.ones(3, dtype=torch.int8)}, steps={"w": torch.tensor([-1.0])})


def test_offloaded_answers_the_same_and_keeps_nothing_on_the_device() -> None:
    source = kit.source_of(kit.net())
    away = source.offloaded()
    assert away.fingerprint() == source.fingerprint()
    model = kit.net()
    names = source.names()
    torch.testing.assert_close(
        flat(away.row(names, list(model.parameters()))), flat(source.row(names, list(model.parameters())))
    )
    # A device that holds no memory stands in for a GPU.
    there = [p.to("meta") for p in model.parameters()]
    row = away.row(names, there)
    assert all(t.device.type == "meta" for part in (row.offset, row.scale, row.anchor) for t in part or ())
    assert all(t.device.type == "cpu" for table in away._tables.values() for t in table.values())
    plain = fixed().offloaded()
    assert not plain.row(names, there).fixed, "a copy made anew at each step has no identity"


def test_what_is_made_of_an_offloaded_source_is_offloaded() -> None:
    there = [p.to("meta") for p in kit.net().parameters()]
    moving, still = kit.source_of(kit.net()).offloaded().anchored(), fixed().offloaded().quantized()
    for source in (moving, still):
        row = source.row(source.names(), there)
        assert all(t.device.type == "meta" for part in row.parts for t in part)
        assert all(t.device.type == "cpu" for table in source._tables.values() for t in table.values())


def test_sixteen_sources_keep_their_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosines and steps are those of sources whose products are taken anew each time."""
    from gradguide.ops import cpu

    left_out: list[int] = []
    gram = cpu.gram

    def counted(rows: list[Row | None], known: frozenset[int] = frozenset()) -> torch.Tensor:
        left_out.append(len(known))
        return gram(rows, known)

    monkeypatch.setattr(cpu, "gram", counted)
    found = []
    for keep in (True, False):
        model = kit.net()
        sources = [fixed(seed) for seed in range(16)]
        if not keep:
            for source in sources:
                monkeypatch.setattr(source, "row", partial(unfixed, source.row))
        optimizer = GradGuide(
            kit.adamw(model.parameters()),
            alignment=Alignment(sources, weight=0.1, on="gradient"),
            names=model.named_parameters(),
        )
        left_out.clear()
        kit.train(model, optimizer, range(4))
        assert left_out.count(16) == (4 if keep else 0)
        found.append((kit.parameters_of(model), optimizer.metrics()))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    for key, value in found[0][1].items():
        assert value == pytest.approx(found[1][1][key], rel=1e-4, abs=1e-5, nan_ok=True), key


def test_products_of_lists_that_do_not_come_again_are_not_kept_for_ever() -> None:
    """As where parameters have gradients in turn: each pattern has lists of its own."""
    from gradguide.ops import cpu
    from gradguide.ops.fixed import FixedProducts

    def rows(first: Tensors) -> list[Row | None]:
        return [Row(offset=[torch.ones(3)]), Row(offset=first, fixed=True), Row(offset=Tensors(first), fixed=True)]

    products = FixedProducts()
    first = Tensors([torch.full((3,), 2.0)])
    kept = weakref.ref(first)
    assert products.gram(cpu, rows(first))[0, 1].tolist() == [6.0, 12.0, 12.0]
    del first
    assert kept() is not None
    for _ in range(100):
        products.gram(cpu, rows(Tensors([torch.ones(3)])))
    assert kept() is None


def unfixed(row: Any, names: list[str], at: list[torch.Tensor]) -> Row:
    return Row(offset=row(names, at).offset)


def test_merging_answers_with_the_sum_of_the_answers_everywhere() -> None:
    """Exactly, with curvature too: wherever the parameters are, not only where a source was captured."""
    torch.manual_seed(0)
    sources = [kit.source_of(kit.net(), seed=seed) for seed in (1, 2, 3)]
    weights = [0.5, 0.0, 2.0]
    for chosen, given in ((sources, weights), (sources, None), ([s.anchored() for s in sources], [1.0, 1.0, 1.0])):
        merged = SourceGradient.merge(chosen, given)
        at = [torch.randn_like(p) for p in kit.net().parameters()]
        names = merged.names()
        each = [flat(source.row(names, at)) for source in chosen]
        wanted = sum(
            (w * row for w, row in zip(given or [1 / 3] * 3, each, strict=True)), torch.zeros((), dtype=torch.float64)
        )
        torch.testing.assert_close(flat(merged.row(names, at)), wanted, rtol=1e-5, atol=1e-6)
    assert merged.weight == 1.0, "what is anchored stays so"


def test_merging_in_8_bits_and_without_curvature() -> None:
    merged = SourceGradient.merge([fixed(1).quantized(), fixed(2)], [1.0, 1.0])
    at = list(kit.net().parameters())
    wanted = flat(fixed(1).row(merged.names(), at)) + flat(fixed(2).row(merged.names(), at))
    torch.testing.assert_close(flat(merged.row(merged.names(), at)), wanted, rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("sources", "weights", "message"),
    [
        (list, None, "at least one source"),
        (lambda: [fixed(1)], [1.0, 2.0], "one for each of 1 sources, found 2"),
        (lambda: [fixed(1)], [-1.0], r"weight must be in \[0, inf\), found -1.0"),
        (lambda: [fixed(1)], [0.0], "must not all be 0"),
        (lambda: [fixed(1), kit.source_of(kit.net())], None, "merge like with like"),
        (lambda: [fixed(1), SourceGradient({"w": torch.ones(2)})], None, "has not the names and shapes of source 0"),
    ],
)
def test_sources_that_do_not_merge(sources: Any, weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SourceGradient.merge(sources(), weights)
