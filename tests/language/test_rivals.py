"""What each rival adds to the gradient, or starts from, is its formula."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.language import fisher, osf, starts
from benchmarks.language.data import Texts
from benchmarks.language.fisher import DiagonalFisher, ProductPull, diagonal_fisher, groups
from benchmarks.language.memories import rows_of
from benchmarks.language.methods import parse, set_up
from benchmarks.language.model import Language
from benchmarks.language.olora import SLOTS, Finished
from benchmarks.language.sources import Sources
from benchmarks.language.training import Setup, Training
from gradguide import SourceGradient

_STRENGTH = 0.001  # so small that the pull is not clipped


@pytest.fixture(scope="module")
def loaded(folder: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Language, Sources, Texts]:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder))
    model, texts = Language(folder, torch.device("cpu")), Texts(sets, tokenizer)
    return model, Sources(model, texts, tokenizer, tmp_path_factory.mktemp("cache"), "key"), texts


@pytest.fixture
def model(loaded: tuple[Language, Sources, Texts]) -> Iterator[Language]:
    """The model with an adapter that is not zero."""
    found = loaded[0]
    found.reset(0)
    _move(found, 1)
    yield found
    found.reset(0)


def _move(model: Language, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters:
        p.data += 0.1 * torch.randn(p.shape, generator=generator)


def _trained(model: Language, sources: Any, method: str, kept: Any = ()) -> Training:
    parsed = parse(method)
    return set_up(parsed, Setup(model=model, sources=sources, lr=1e-3, method=parsed, kept=kept))


def _pulled(model: Language, pull: Callable[[], None]) -> list[Tensor]:
    for p in model.parameters:
        p.grad = torch.zeros_like(p)
    pull()
    return [p.grad.double() for p in model.parameters if p.grad is not None]


def _expected(model: Language, penalty: Callable[[], Tensor]) -> list[Tensor]:
    return [g.double() for g in torch.autograd.grad(penalty(), model.parameters, materialize_grads=True)]


def _close(found: list[Tensor], expected: list[Tensor]) -> None:
    assert any(bool(part.any()) for part in expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_ewc_pulls_each_element_by_its_fisher_information(model: Language) -> None:
    generator = torch.Generator().manual_seed(5)
    tasks = []
    for _ in range(2):
        information = {name: torch.rand(p.shape, generator=generator) for name, p in model.named}
        anchor = {name: p.detach().clone() for name, p in model.named}
        tasks.append(SourceGradient(None, fisher=information, anchor=anchor))
        _move(model, 3)
    training = _trained(model, None, f"ewc:{_STRENGTH}", tasks)

    def penalty() -> Tensor:
        parts = [
            (task.fisher[name] * (p - task.anchor[name]).square()).sum() for task in tasks for name, p in model.named
        ]
        return _STRENGTH / 2 * torch.stack(parts).sum()

    _close(_pulled(model, training.before), _expected(model, penalty))


def test_l2_sp_pulls_to_the_start(model: Language) -> None:
    start = [p.detach().clone() for p in model.parameters]
    training = _trained(model, None, f"l2sp:{_STRENGTH}")
    _move(model, 2)

    def penalty() -> Tensor:
        far = [(p - before).square().sum() for p, before in zip(model.parameters, start, strict=True)]
        return _STRENGTH / 2 * torch.stack(far).sum()

    _close(_pulled(model, training.before), _expected(model, penalty))


def _products(model: Language) -> list[Tensor]:
    found = []
    for layers in groups(model):
        pairs = [model.factors(layer) for layer in layers]
        found.append(torch.stack([model.scale * b @ a for a, b in pairs]))
    return found


def test_l2_sp_on_the_product_pulls_the_change_of_the_weights(model: Language) -> None:
    start = [part.detach() for part in _products(model)]
    training = _trained(model, None, f"l2sp-ba:{_STRENGTH}")
    _move(model, 2)

    def penalty() -> Tensor:
        pairs = zip(_products(model), start, strict=True)
        return _STRENGTH / 2 * torch.stack([(now - before).square().sum() for now, before in pairs]).sum()

    _close(_pulled(model, training.before), _expected(model, penalty))


def test_ewc_lora_sums_the_penalties_of_tasks_over_the_weights(model: Language) -> None:
    generator = torch.Generator().manual_seed(6)
    tasks, anchors = [], []
    for _ in range(2):
        anchors.append([part.detach().clone() for part in _products(model)])
        information = [torch.rand(part.shape, generator=generator) for part in anchors[-1]]
        tasks.append(DiagonalFisher(information, anchors[-1]))
        _move(model, 4)
    tasks.append(DiagonalFisher([torch.rand(part.shape, generator=generator) for part in anchors[0]], None))
    anchors.append([torch.zeros_like(part) for part in anchors[0]])
    held = [list(task.fisher) for task in tasks]
    total = DiagonalFisher([part.clone() for part in tasks[-1].fisher], None)
    for earlier in tasks[:-1]:
        total.add(earlier)
    training = _trained(model, None, f"ewc-lora:{_STRENGTH}", [total])

    def penalty() -> Tensor:
        parts = [
            (information * (now - before).square()).sum()
            for fishers, anchor in zip(held, anchors, strict=True)
            for information, now, before in zip(fishers, _products(model), anchor, strict=True)
        ]
        return _STRENGTH / 2 * torch.stack(parts).sum()

    _close(_pulled(model, training.before), _expected(model, penalty))


def test_the_fisher_information_over_weights_is_that_of_whole_rows(
    loaded: tuple[Language, Sources, Texts], model: Language, monkeypatch: pytest.MonkeyPatch
) -> None:
    def likely(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        """The labels of the data, so that the two computations see the same."""
        logits = module(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
        labels = batch["labels"][:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), int((labels != -100).sum())

    monkeypatch.setattr(fisher, "sampled_loss", likely)
    rows = loaded[2].target("subj", 2, 0).rows
    found = diagonal_fisher(model, rows_of(rows, model.device))
    weights = [layer.base_layer.weight.requires_grad_() for layers in groups(model) for layer in layers]
    sums, predictions = [torch.zeros_like(w) for w in weights], 0
    for batch in rows_of(rows, model.device):
        for row in range(len(batch["input_ids"])):
            loss, number = likely(model.model, {name: value[row : row + 1] for name, value in batch.items()})
            predictions += number
            for total, gradient in zip(sums, torch.autograd.grad(loss * number, weights), strict=True):
                total += gradient.square()
    for w in weights:
        w.requires_grad_(False)
    flat = [part for each in found.fisher for part in each]
    for one, total in zip(flat, sums, strict=True):
        torch.testing.assert_close(one, total / predictions, rtol=1e-3, atol=1e-9)


def _logits(model: Language) -> Tensor:
    ids = torch.arange(4, 16).view(2, 6)
    found: Tensor = model.model(input_ids=ids).logits.detach()
    return found


def test_o_lora_keeps_the_function_and_penalises_overlap_with_earlier_tasks(model: Language) -> None:
    before, trained = _logits(model), [p.detach().clone() for p in model.parameters]
    finished = Finished(model)
    torch.testing.assert_close(_logits(model), before)
    finished.add()
    torch.testing.assert_close(_logits(model), before, rtol=1e-4, atol=1e-5)
    assert not any(bool(p.any()) for p in model.lora_b)
    _move(model, 8)
    assert not torch.allclose(_logits(model), before, atol=1e-3)
    training = _trained(model, None, f"olora:{_STRENGTH}", [finished])
    earlier = [a for a, (name, _) in zip(trained, model.named, strict=True) if ".lora_A." in name]

    def penalty() -> Tensor:
        present = [p for name, p in model.named if ".lora_A." in name]
        parts = [(old @ a.mT).square().sum() for old, a in zip(earlier, present, strict=True)]
        return _STRENGTH * torch.stack(parts).sum()

    _close(_pulled(model, training.before), _expected(model, penalty))
    model.reset(0)
    with model.model.disable_adapter():
        base = _logits(model)
    torch.testing.assert_close(_logits(model), base)
    assert model.variant == ""


def test_o_lora_has_room_for_four_tasks(model: Language) -> None:
    finished = Finished(model)
    for _ in range(SLOTS):
        finished.add()
    with pytest.raises(ValueError, match="room for 4"):
        finished.add()


@pytest.mark.parametrize("method", ["corda", "lora-null"])
def test_a_start_in_the_weights_keeps_the_function_and_storage(
    loaded: tuple[Language, Sources, Texts], model: Language, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model.reset(0)
    before = _logits(model)
    weights = [layer.base_layer.weight for _, layer in model.layers()]
    held = [w.detach().clone() for w in weights]
    places = [p.data_ptr() for p in (*model.parameters, *weights)]
    texts = loaded[2].windows("capture", 8)
    eigens = starts.corda_eigens(model, list(texts))
    unused = starts.unused_directions(model, [{"input_ids": t, "attention_mask": torch.ones_like(t)} for t in [texts]])
    sources = loaded[1]
    monkeypatch.setattr(sources, "corda", lambda: eigens)
    monkeypatch.setattr(sources, "unused", lambda: unused)
    for _ in range(2):  # the directions are not used up
        model.reset(0)
        _trained(model, sources, method)
        assert all(bool(p.any()) for p in model.lora_b)
        assert not any(torch.equal(w, old) for w, old in zip(weights, held, strict=True))
        torch.testing.assert_close(_logits(model), before, rtol=1e-3, atol=1e-4)
        assert places == [p.data_ptr() for p in (*model.parameters, *weights)]
    if method == "lora-null":
        for name, layer in model.layers():
            a = model.factors(layer)[0].detach()
            torch.testing.assert_close(a @ unused[name] @ unused[name].mT, a, rtol=1e-3, atol=1e-5)
    model.reset(0)
    assert all(torch.equal(w, old) for w, old in zip(weights, held, strict=True))


@pytest.mark.parametrize(("budget", "kept"), [(0.0, False), (1e9, True)])
def test_stopping_early_keeps_the_last_adapter_within_the_budget(
    loaded: tuple[Language, Sources, Texts], model: Language, budget: float, kept: bool
) -> None:
    start = [p.detach().clone() for p in model.parameters]
    training = _trained(model, loaded[1], f"early:{budget}")
    assert training.after is not None
    for step in range(1, 9):
        _move(model, step)
        training.after(step)
    last = [p.detach().clone() for p in model.parameters]
    training.end()
    expected = last if kept else start
    assert all(torch.equal(p, other) for p, other in zip(model.parameters, expected, strict=True))


def test_the_pull_of_no_change_is_nothing(model: Language) -> None:
    found = _pulled(model, ProductPull(model, None, 3.0))
    assert max(float(part.abs().max()) for part in found) < 1e-5


def test_unused_directions_are_those_of_the_least_inputs_without_padding(
    loaded: tuple[Language, Sources, Texts], model: Language
) -> None:
    model.reset(0)
    texts = loaded[2].windows("capture", 6)
    mask = torch.ones_like(texts)
    mask[3:, 40:] = 0
    batches = [
        {"input_ids": ids, "attention_mask": part} for ids, part in zip(texts.split(4), mask.split(4), strict=True)
    ]
    found = starts.unused_directions(model, batches)
    inputs: dict[str, list[Tensor]] = {name: [] for name, _ in model.layers()}
    handles = [
        layer.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0].detach()))
        for name, layer in model.layers()
    ]
    for ids, part in zip(texts, mask, strict=True):
        model.hidden(ids[None, : int(part.sum())])
    for handle in handles:
        handle.remove()
    assert set(found) == set(inputs)
    for name, rows in inputs.items():
        x = torch.cat([part[0] for part in rows]).double()
        values, vectors = torch.linalg.eigh(x.mT @ x)
        u = found[name].double()
        torch.testing.assert_close(u.mT @ u, torch.eye(u.shape[1]).double(), rtol=0, atol=1e-5)
        used = float((x @ u).square().sum())
        assert used == pytest.approx(float(values[: u.shape[1]].sum()), rel=1e-2, abs=1e-3)
        assert u.shape[1] == min(64, len(vectors) - 1)


def test_osf_starts_as_the_model_and_trains_the_least_directions(
    loaded: tuple[Language, Sources, Texts], model: Language
) -> None:
    model.reset(0)
    ids = torch.arange(1, 9)[None]
    before = model.hidden(ids).detach()
    layers = [layer for _, layer in model.layers()]
    weights = [layer.base_layer.weight for layer in layers]
    for _ in range(2):  # the second start is the first one again
        training = _trained(model, loaded[1], "osf:0.75")
        torch.testing.assert_close(model.hidden(ids), before, rtol=1e-5, atol=1e-5)
        model.hidden(ids).square().sum().backward()
        for layer, weight in zip(layers, weights, strict=True):
            u, s, v = torch.linalg.svd(weight.detach(), full_matrices=False)
            high = round(0.75 * len(s))
            parts = layer.base_layer.osf_svd_params["default"]
            assert parts["U_low"].shape == (len(u), len(s) - high)
            assert float((u[:, :high].T @ parts["U_low"].grad).abs().max()) < 1e-4
            assert float((v[:high] @ parts["V_low"].grad.T).abs().max()) < 1e-4
        training.before()
        training.optimizer.step()
        assert float((model.hidden(ids) - before).detach().abs().max()) > 1e-4
        assert all(p.grad is None for _, p in model.named)
        trained = list(model.parameters)
        assert all(p.grad is not None for p in trained)
        model.reset(0)
        assert all(p.grad is None for p in trained)
        assert all(layer.base_layer.weight is weight for layer, weight in zip(layers, weights, strict=True))
        assert torch.equal(model.hidden(ids), before)
        assert all(p.requires_grad for p in model.parameters)


def test_osf_refuses_a_second_task_which_would_undo_the_first(
    loaded: tuple[Language, Sources, Texts], model: Language
) -> None:
    model.reset(0)
    _trained(model, loaded[1], "osf:0.75")
    for method in ("osf:0.75", "osf:0.5"):
        with pytest.raises(ValueError, match="one task per run"):
            _trained(model, loaded[1], method)
    model.reset(0)
    _trained(model, loaded[1], "osf:0.5")


def test_osf_in_float32_leaves_a_bfloat16_layer_as_it_is() -> None:
    pytest.importorskip("peft")
    base = nn.Linear(12, 8, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    made = osf._make(base, 0.5)
    assert made.base_layer is base
    assert base.weight.dtype == torch.bfloat16
    parts = made.osf_svd_params["default"]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in parts.values())
    identity = torch.eye(parts["U_low"].shape[1])
    torch.testing.assert_close(parts["U_low"].T @ parts["U_low"], identity, rtol=0, atol=1e-5)
    x = torch.randn(3, 12, dtype=torch.bfloat16)
    assert torch.equal(made(x), base(x))
