"""Capture sources of LoRA adapters, train with them, and save them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from gradguide import Alignment, Direction, GradGuide, SourceGradient
from gradguide.integrations.peft import lora_parameters

from .lora import QUIET, Classifier, bert, capture, cross_entropy, examples, llama, move

pytestmark = QUIET


def adapted(rank: int = 2) -> Classifier:
    model = Classifier(bert(rank))
    move(model)
    return model


def test_warning_while_every_b_is_zero() -> None:
    model = Classifier(bert())
    with pytest.warns(
        UserWarning, match=r"of 13 of 13 LoRA A matrices is zero .*B = 0.*after source adaptation"
    ) as caught:
        SourceGradient.capture(model, examples(1), cross_entropy, curvature=False)
    (warning,) = [w for w in caught if "LoRA" in str(w.message)]
    assert warning.filename == __file__


def test_warning_counts_the_layers_that_are_still_at_zero() -> None:
    model = adapted()
    layer = model.get_parameter("encoder.base_model.model.pooler.dense.lora_B.default.weight")
    with torch.no_grad():
        layer.zero_()
    with pytest.warns(UserWarning, match=r"of 1 of 13 LoRA A matrices is zero \(first: .*pooler\.dense\.lora_A"):
        SourceGradient.capture(model, examples(1), cross_entropy, curvature=False)


def test_no_warning_once_b_has_moved() -> None:
    for model in (adapted(), nn.Linear(2, 2)):
        data = examples(1) if isinstance(model, Classifier) else [(torch.zeros(2, 2), torch.zeros(2).long())]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SourceGradient.capture(model, data, cross_entropy, curvature=False)


def test_capture_is_of_the_adapter() -> None:
    model = adapted()
    source = capture(model)
    assert source.names() == [name for name, _ in lora_parameters(model)]
    assert source.shapes() == {name: p.shape for name, p in lora_parameters(model)}
    # Against one backward pass over all examples together, in eval mode.
    model.eval()
    ids, labels = (torch.cat(parts) for parts in zip(*examples(1), strict=True))
    cross_entropy(model, (ids, labels)).backward()
    at = [p.detach() for _, p in lora_parameters(model)]
    row = source.row(source.names(), at)
    for i, (_, p) in enumerate(lora_parameters(model)):
        assert p.grad is not None
        torch.testing.assert_close(row.value(i, torch.float32).reshape(p.shape), p.grad, rtol=1e-3, atol=1e-7)


@pytest.fixture(scope="module")
def learned() -> Learned:
    """A model trained on the source task with all trainable parameters, and the source of its adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.manual_seed(0)
        model = Classifier(bert())
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(6):
        for batch in examples(1):
            cross_entropy(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
    return Learned(model, {name: value.clone() for name, value in model.state_dict().items()}, capture(model))


@dataclass
class Learned:
    model: Classifier
    state: dict[str, Tensor]
    source: SourceGradient

    def adapt(self, seed: int = 3, **options: Any) -> Adapted:
        """Train on a target with a new head outside ``names``, from the same initial state."""
        model = self.model
        model.load_state_dict(self.state)
        torch.manual_seed(seed)
        model.head.reset_parameters()
        model.train()
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = GradGuide(
            AdamW(trained, lr=1e-2), names=lora_parameters(model), **({"direction": Direction()} | options)
        )
        losses = []
        for _ in range(5):
            for batch in examples(2):
                loss = cross_entropy(model, batch)
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
                optimizer.zero_grad()
        modelled = self.modelled()
        # The source loss needs the head of the source task.
        model.head.load_state_dict({name: self.state[f"head.{name}"] for name in ("weight", "bias")})
        model.eval()
        with torch.no_grad():
            kept = sum(cross_entropy(model, batch).item() for batch in examples(1)) / len(examples(1))
        return Adapted(sum(losses[:6]) / 6, sum(losses[-6:]) / 6, modelled, kept, optimizer.metrics())

    def modelled(self) -> float:
        """Return the rise of the source loss that the source predicts: s0 d + F d^2 / 2."""
        pairs = lora_parameters(self.model)
        row = self.source.row([name for name, _ in pairs], [p.detach() for _, p in pairs])
        assert row.offset is not None
        assert row.scale is not None
        assert row.anchor is not None
        parts = zip(row.offset, row.scale, row.anchor, pairs, strict=True)
        moves = [(s0, f, p.detach() - anchor) for s0, f, anchor, (_, p) in parts]
        return sum(float((s0 * d + 0.5 * f * d.square()).sum()) for s0, f, d in moves)


@dataclass
class Adapted:
    first: float
    last: float
    modelled: float
    source_loss: float
    metrics: dict[str, float]


def test_whole_loop(learned: Learned, tmp_path: Path) -> None:
    learned.source.save(tmp_path / "source.safetensors")
    source = SourceGradient.load(tmp_path / "source.safetensors")
    plain = learned.adapt(direction=None, magnitude=None)
    guided = learned.adapt(direction=None, magnitude=None, alignment=Alignment(source, weight=1.0))
    for run in (plain, guided):
        assert run.last < 0.8 * run.first
    assert guided.modelled < plain.modelled - 0.1
    assert guided.metrics["steps"] == 30
    assert -1 <= guided.metrics["source_cosine"] <= 1
    assert guided.metrics["update_norm"] > 0


def test_defaults_keep_the_source(learned: Learned) -> None:
    """With default options, the final source loss is below that without the source, on average over heads."""
    anchored = Alignment(learned.source.anchored())
    plain, guided = ([learned.adapt(seed, alignment=each) for seed in range(3, 8)] for each in (None, anchored))
    before = learned.source.metadata["loss"]
    lost, kept = (sum(run.source_loss for run in runs) / len(runs) - before for runs in (plain, guided))
    assert lost > 0.2 * before
    assert kept < 0.8 * lost, f"{kept=}, {lost=}"
    assert all(run.last < run.first for run in guided)


def test_head_outside_names_gets_no_pull() -> None:
    model = adapted()
    source = capture(model)
    model.head = nn.Linear(16, 3)
    optimizer = GradGuide(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0),
        direction=None,
        alignment=Alignment(source, weight=7.0, project=False),
        magnitude=None,
        names=lora_parameters(model),
    )
    cross_entropy(model, examples(2)[0]).backward()
    received = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
    optimizer.step()
    for p in model.head.parameters():
        assert p.grad is not None
        assert torch.equal(p.grad, received[p])
    row = source.row(source.names(), [p.detach() for _, p in lora_parameters(model)])
    for i, (_, p) in enumerate(lora_parameters(model)):
        pull = 7.0 * row.value(i, torch.float32).reshape(p.shape)
        torch.testing.assert_close(p.grad, received[p] + pull, rtol=1e-4, atol=1e-6)


def test_head_in_names_is_refused_with_the_way_out() -> None:
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"2 missing from the source \(head\.weight, head\.bias\).*leave them out"):
        GradGuide(
            AdamW(trained), alignment=Alignment(capture(model)), names=model.named_parameters(), direction=Direction()
        )


def tensors(source: SourceGradient) -> list[Tensor]:
    row = source.row(source.names(), [torch.zeros(shape) for shape in source.shapes().values()])
    assert row.offset is not None
    assert row.scale is not None
    assert row.anchor is not None
    return [*row.offset, *row.scale, *row.anchor]


def test_file_round_trip_into_another_model(tmp_path: Path) -> None:
    source = capture(adapted())
    source.save(tmp_path / "s.safetensors")
    loaded = SourceGradient.load(tmp_path / "s.safetensors")
    assert loaded.names() == source.names()
    assert loaded.metadata == source.metadata
    assert all(torch.equal(a, b) for a, b in zip(tensors(loaded), tensors(source), strict=True))
    other = Classifier(bert())
    move(other, 1.0)
    GradGuide(
        AdamW([p for _, p in lora_parameters(other)]),
        alignment=Alignment(loaded),
        names=lora_parameters(other),
        direction=Direction(),
    )


@pytest.mark.parametrize("rank", [1, 4])
def test_source_of_another_rank_is_refused(tmp_path: Path, rank: int) -> None:
    capture(adapted(rank)).save(tmp_path / "s.safetensors")
    source = SourceGradient.load(tmp_path / "s.safetensors")
    model = adapted(2)
    with pytest.raises(ValueError) as caught:
        GradGuide(
            AdamW([p for _, p in lora_parameters(model)]),
            alignment=Alignment(source),
            names=lora_parameters(model),
            direction=Direction(),
        )
    message = str(caught.value)
    assert "26 of another shape" in message
    assert f"query.lora_A.default.weight ({rank}, 16) for (2, 16)" in message
    assert f"query.lora_B.default.weight (16, {rank}) for (16, 2)" in message
    assert "and 21 more" in message
    assert "missing" not in message


def test_source_of_other_layers_is_refused() -> None:
    model = Classifier(bert(target_modules=["query", "key"]))
    move(model)
    source = capture(model)
    other = Classifier(bert(target_modules=["query", "value"]))
    with pytest.raises(ValueError, match=r"4 missing from the source \(.*value.*4 unexpected in the source \(.*key"):
        GradGuide(
            AdamW([p for _, p in lora_parameters(other)]),
            alignment=Alignment(source),
            names=lora_parameters(other),
            direction=Direction(),
        )


def fingerprint(model: nn.Module) -> str:
    def first(m: nn.Module, batch: Tensor) -> Tensor:
        return torch.stack([p.sum() for p in m.parameters() if p.requires_grad]).sum()

    source = SourceGradient.capture(model, [torch.zeros(1)], first, curvature=False)
    digest: str = source.metadata["adapter"]
    return digest


def test_fingerprint_tells_adapters_apart() -> None:
    one = fingerprint(bert())
    assert len(one) == 64
    assert fingerprint(bert(seed=3)) == one
    assert fingerprint(bert(rank=3)) != one
    assert fingerprint(bert(lora_alpha=32)) != one
    assert fingerprint(bert(target_modules=["query"])) != one
    elsewhere = bert()
    elsewhere.peft_config["default"].base_model_name_or_path = "/somewhere/else"
    assert fingerprint(elsewhere) == one


def test_causal_language_model() -> None:
    model = llama()
    move(model)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(40, (2, 6), generator=generator)} for _ in range(3)]

    def loss(m: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        value: Tensor = m(**batch, labels=batch["input_ids"]).loss
        return value

    source = SourceGradient.capture(model, batches, loss)
    assert source.names() == [name for name, _ in lora_parameters(model)]
    assert source.metadata["examples"] == 6
    assert 2.0 < source.metadata["loss"] < 6.0
    optimizer = GradGuide(
        AdamW([p for _, p in lora_parameters(model)], lr=1e-3),
        alignment=Alignment(source),
        names=lora_parameters(model),
        direction=Direction(),
    )
    for batch in batches:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.metrics()["steps"] == 3
