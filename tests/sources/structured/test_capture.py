"""Capture structured sources from every kind of model, without side effects, and reject unsupported ones."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, BartForConditionalGeneration

from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from gradguide.sources.structured.recorder import Recorder
from gradguide.sources.structured.statistics import BUFFERED
from tests.operations import Operations
from tests.sources.structured.problems import adapted, gpt2, llama, spread, text


def close(a: StructuredSource, b: StructuredSource, tolerance: float = 1e-4) -> None:
    assert a.names() == b.names()
    for name in a.names():
        for left, right in zip(a.factors(name), b.factors(name), strict=True):
            assert float((left - right).norm()) <= tolerance * float(right.norm()), name


def test_names_are_those_of_the_base_model_without_the_language_head() -> None:
    source = StructuredSource.capture(llama(), text(2), sampled_loss, rank=4)
    assert len(source.names()) == 14
    assert source.names()[0] == "model.layers.0.self_attn.q_proj"
    assert not any("head" in name for name in source.names())
    assert StructuredSource.capture(adapted(llama()), text(2), sampled_loss, rank=4).names() == source.names()


def test_a_wrapped_model_has_no_other_layers() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = llama(1)

        def forward(self, **batch: Tensor) -> Any:
            return self.module(**batch)

    source = StructuredSource.capture(Wrapper(), text(2), sampled_loss, rank=4)
    assert source.names() == StructuredSource.capture(llama(1), text(2), sampled_loss, rank=4).names()


class Stack(nn.Module):
    """Linear layers whose factors are sketches."""

    LAYERS = 3

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 64)
        self.layers = nn.Sequential(*(nn.Linear(64, 64) for _ in range(self.LAYERS)))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids)
        found: Tensor = self.layers(x if x.requires_grad else x.requires_grad_())
        return found


@pytest.mark.parametrize(
    ("padding", "dtype", "most"), [(0, torch.float32, 26), (0, torch.bfloat16, 28), (2, torch.float32, 31)]
)
def test_few_operations_are_called_for_each_layer_and_batch(padding: int, dtype: torch.dtype, most: int) -> None:
    """On a GPU, the launches of operations set the speed of a capture."""
    model, count = Stack().to(dtype), 16  # fills the buffers of sequences twice
    batches = [passes((4, 8), padding=padding)] * (2 * count)
    for _, mask in batches[0]:
        mask[0, 8 - padding :] = 0
    few, many, plain = Operations(), Operations(), Operations()
    with few:
        StructuredSource.capture(model, batches[:count], squares, rank=8)
    with many:
        StructuredSource.capture(model, batches, squares, rank=8)
    model.requires_grad_(False)
    with plain:
        for batch in batches[:count]:
            squares(model, batch)[0].backward()
    added = len(many.names) - len(few.names) - len(plain.names)
    assert 0 < added <= most * count * Stack.LAYERS


def moments(x: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return S and G of pairs [m, in] and [m, out] by their definition. Half of tr(D^T G D S) is a sum over pairs."""
    weights, others = d.square().sum(1), x.square().sum(1)
    s, g = torch.einsum("m,mi,mj->ij", weights, x, x), torch.einsum("m,mi,mj->ij", others, d, d)
    return s / weights.sum(), g * weights.sum() / (weights * others).sum()


@pytest.mark.parametrize(("padding", "count"), [(0, 3), (5, 3), (5, 13)])
def test_the_factors_are_the_moments_of_tokens_and_of_sequences(padding: int, count: int) -> None:
    """The factors of one layer equal moments from explicit hooks. 13 batches of 3 do not fill buffers evenly."""
    assert BUFFERED < 13 * 3
    assert BUFFERED % 3 != 0
    model, batches = llama(1), text(count)
    for batch in batches:
        if padding:
            batch["attention_mask"][0, -padding:] = 0
    name = "model.layers.0.mlp.down_proj"
    layer = model.get_submodule(name)
    torch.manual_seed(0)
    source = StructuredSource.capture(model, batches, sampled_loss, rank=None, modules=name)
    torch.manual_seed(0)
    tokens: list[tuple[Tensor, Tensor]] = []
    sequences: list[tuple[Tensor, Tensor]] = []
    lengths: list[Tensor] = []
    predictions = 0
    for batch in batches:
        kept: list[Tensor] = []

        def keep(module: nn.Module, given: Any, output: Tensor, kept: list[Tensor] = kept) -> None:
            output.retain_grad()
            kept.extend([given[0], output])

        handle = layer.register_forward_hook(keep)
        loss, number = sampled_loss(model, batch)
        handle.remove()
        (loss * number).backward()
        predictions += number
        gradient = kept[1].grad
        assert gradient is not None
        for x, y, d, mask in zip(*kept, gradient, batch["attention_mask"], strict=True):
            x, d = x[mask > 0].detach().double(), d[mask > 0].double()
            tokens.append((x - x.mean(0), d))
            lengths.append(y[mask > 0].detach().double().square().sum(1))
            sequences.append((x.mean(0, keepdim=True), d.sum(0, keepdim=True)))
    found = source.factors(name)
    for k, pairs in enumerate((tokens, sequences)):
        s, g = moments(torch.cat([x for x, _ in pairs]), torch.cat([d for _, d in pairs]))
        assert float((found[0][k] - s).norm()) < 1e-4 * float(s.norm())
        assert float((found[1][k] - g / predictions).norm()) < 1e-4 * float(g.norm()) / predictions
    assert source._layers[name].scale == pytest.approx(float(torch.cat(lengths).mean()), rel=1e-5)
    assert source.metadata["sequences"] == 3 * count
    assert source.metadata["tokens"] == 3 * count * 16 - count * padding


class Flattened(nn.Module):
    """A layer that receives the tokens of all sequences as rows, or with sequences and tokens exchanged."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(7, 4), nn.Linear(4, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.embedding(ids))
        found: Tensor
        match self.form:
            case "rows":
                found = self.layer(x.flatten(0, 1)).view(*ids.shape, 5)
            case "exchanged":
                found = self.layer(x.transpose(0, 1)).transpose(0, 1)
            case _:
                found = self.layer(x)
        return found


@pytest.mark.parametrize("form", ["rows", "exchanged"])
def test_tokens_belong_to_their_sequence_in_every_form(form: str) -> None:
    ids = torch.randint(7, (3, 6), generator=torch.Generator().manual_seed(0))
    target = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))

    def loss(model: nn.Module, ids: Tensor) -> tuple[Tensor, int]:
        return (model(ids) * target).mean(), ids.numel()

    plain, other = (StructuredSource.capture(Flattened(each), [ids], loss, rank=None) for each in ("plain", form))
    close(other, plain)
    assert (other.metadata["sequences"], other.metadata["tokens"]) == (3, 18)


def test_the_pairs_add_up_to_the_curvature_of_one_sequence() -> None:
    """For one sequence with one token, half the trace is half the squared change of its log likelihood."""
    model = nn.Linear(4, 3, bias=False)
    x, target = torch.randn(1, 4), torch.tensor([1])

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return nn.functional.cross_entropy(model(x), target), 1

    s, g = StructuredSource.capture(nn.Sequential(model), [x], loss, rank=None).factors("0")
    weight = model.weight.detach().requires_grad_()
    nn.functional.cross_entropy(x @ weight.T, target).backward()
    moved = torch.randn(3, 4)
    value = 0.5 * (moved.T @ g @ moved @ s).diagonal(dim1=-2, dim2=-1).sum()
    assert weight.grad is not None
    torch.testing.assert_close(value, 0.5 * (weight.grad * moved).sum().square())


def test_everything_is_afterwards_as_it_was() -> None:
    model = adapted(llama(), lora_dropout=0.1)
    spread(model, 0.1)
    model.train()
    model.base_model.model.model.layers[0].eval()  # type: ignore[union-attr, index]
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    before = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    StructuredSource.capture(model, text(3), sampled_loss, rank=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    for name, p in model.named_parameters():
        value, needed, gradient = before[name]
        assert torch.equal(p, value)
        assert p.requires_grad == needed
        assert p.grad is gradient
        assert gradient is None or bool((gradient == 1).all())


def test_an_error_in_the_middle_leaves_everything_too() -> None:
    model = adapted(llama())

    def fails(model: nn.Module, batch: Any) -> Tensor:
        raise RuntimeError("no more memory")

    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(RuntimeError, match="no more memory"):
        StructuredSource.capture(model, text(2), fails, rank=4)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert any(p.requires_grad for p in model.parameters())


def test_padding_does_not_count() -> None:
    model = llama()
    short = text(3, length=10)
    padded = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 6)),
            "attention_mask": nn.functional.pad(batch["attention_mask"], (0, 6)),
        }
        for batch in short
    ]
    one = StructuredSource.capture(model, short, sampled_loss, rank=None)
    other = StructuredSource.capture(model, padded, sampled_loss, rank=None)
    assert one.metadata["tokens"] == other.metadata["tokens"]
    for name in one.names():
        torch.testing.assert_close(other.factors(name)[0], one.factors(name)[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("length", [16, 10])
def test_each_forward_pass_of_a_loss_has_its_own_mask(length: int) -> None:
    model, batch = llama(), text(1)[0]
    first, second = (dict(batch, attention_mask=torch.ones(3, 16, dtype=torch.int64)) for _ in range(2))
    first["attention_mask"][:, 8:] = 0
    second["attention_mask"][:, :4] = 0
    second = {key: value[:, :length] for key, value in second.items()}

    def both(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        (one, count), (other, further) = (sampled_loss(model, each) for each in batch)
        return (one * count + other * further) / (count + further), count + further

    together = StructuredSource.capture(model, [(first, second)], both, rank=None)
    apart = StructuredSource.capture(model, [first, second], sampled_loss, rank=None)
    assert together.metadata["tokens"] == apart.metadata["tokens"]
    for name in apart.names():
        torch.testing.assert_close(together.factors(name)[0], apart.factors(name)[0], rtol=1e-4, atol=1e-6)


def test_a_layer_that_is_called_twice_counts_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(torch.tanh(self.layer(x)))
            return found

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(50, 4)
    source = StructuredSource.capture(model, [x], lambda model, x: (model(x).square().mean(), len(x)), rank=None)
    inner = model.layer(x)
    inner.retain_grad()
    outer = model.layer(torch.tanh(inner))
    outer.retain_grad()
    (outer.square().mean() * 50).backward()
    assert inner.grad is not None
    assert outer.grad is not None
    s, g = moments(torch.cat([x, torch.tanh(inner).detach()]), torch.cat([inner.grad, outer.grad]))
    torch.testing.assert_close(source.factors("layer")[0][1], s, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(source.factors("layer")[1][1], g / 50, rtol=1e-4, atol=1e-8)
    assert not source.factors("layer")[0][0].any()  # rows are sequences of one token


class Experts(nn.Module):
    """Two experts, each for the tokens of one sign; ``skip`` leaves out an expert without tokens."""

    def __init__(self, skip: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        x, shape = x.flatten(0, 1), x.shape
        found = torch.zeros_like(x)
        for chosen, expert in zip((x[:, 0] > 0, x[:, 0] <= 0), self.experts, strict=True):
            if not self.skip or chosen.any():
                found = found.index_put((chosen,), expert(x[chosen]))
        return found.view(shape)


def test_an_expert_without_tokens_in_a_batch_adds_nothing() -> None:
    rows = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0)).abs()
    batches = [rows, -rows]

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return model(x).square().mean(), x.shape[0] * x.shape[1]

    found, expected = (StructuredSource.capture(Experts(skip), batches, loss, rank=None) for skip in (False, True))
    assert found.names() == ["experts.0", "experts.1"]
    assert found.fingerprint() == expected.fingerprint()


def test_inputs_without_a_gradient_keep_their_covariance() -> None:
    """The floor of the pull needs S where the model is sure of its source."""
    rows = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return 0.0 * model(x).sum(), len(x)

    s, g = StructuredSource.capture(nn.Sequential(nn.Linear(4, 2)), [rows], loss, rank=None).factors("0")
    centered = (rows - rows.mean(1, keepdim=True)).flatten(0, 1)
    torch.testing.assert_close(s[0], centered.T @ centered / 18, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(s[1], rows.mean(1).T @ rows.mean(1) / 6, rtol=1e-4, atol=1e-6)
    assert not g.any()


def test_recomputation_in_the_backward_pass_does_not_count() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = checkpoint(lambda x: self.block[0](x).tanh() * self.block[1](x), x, use_reentrant=False)
            return found

    source = StructuredSource.capture(
        Checkpointed(), [torch.ones(5, 4)], lambda model, x: model(x).square().mean(), rank=4
    )
    assert source.metadata["tokens"] == 5


def test_a_layer_may_be_called_with_a_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.layer(input=x)
            return found

    rows = torch.eye(4)
    source = StructuredSource.capture(Keyword(), [rows], lambda model, x: model(x).sum(), rank=None)
    torch.testing.assert_close(source.factors("layer")[0][1], rows / 4)


def test_the_sums_of_a_capture_inside_autocast_are_float32() -> None:
    model = nn.Linear(40, 40, bias=False)
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).bfloat16().float()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found: Tensor = model(x).float().sum()  # bfloat16 holds its gradients without rounding
        return found

    source = StructuredSource.capture(nn.Sequential(model), [rows], loss, rank=8)
    exact = StructuredSource.capture(nn.Sequential(model), [rows], lambda model, x: model(x).sum(), rank=8)
    torch.testing.assert_close(source.factors("0")[0], exact.factors("0")[0])


def test_a_capture_inside_autocast_is_float32_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(40, 40, bias=False))
    batches = torch.randn(6, 4, 8, 40, generator=torch.Generator().manual_seed(0)).unbind()

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        with torch.autocast("cpu", enabled=False):
            found: Tensor = model(x).square().sum()
        return found, 32

    exact = StructuredSource.capture(model, batches, loss, rank=8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        source = StructuredSource.capture(model, batches, loss, rank=8)
    for found, wanted in zip(source.factors("0"), exact.factors("0"), strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj"], ["down_proj"], ["lm_head"]])
def test_predictions_are_counted_at_the_logits(targets: list[str]) -> None:
    """A layer before the last attention has gradients at tokens that predict nothing."""
    batches = text(3)
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(torch.arange(16) < 10, -100)
    model = adapted(llama(), target_modules=targets)
    for loss in (sampled_loss, lambda model, batch: sampled_loss(model, batch)[0]):
        source = StructuredSource.capture(model, batches, loss, rank=4)
        assert source.metadata["predictions"] == 3 * 3 * 6
        assert all(name.endswith(tuple(targets)) for name in source.names())


def test_predictions_of_a_loss_without_logits_have_to_be_given() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch, output_hidden_states=True).hidden_states[-1].square().mean()
        return found

    with pytest.raises(ValueError, match=r"does not use the model's logits.*return the mean and the number"):
        StructuredSource.capture(llama(), text(1), loss, rank=4)
    source = StructuredSource.capture(llama(), text(3), lambda m, b: (loss(m, b), 48), rank=4, modules="q_proj")
    assert source.metadata["predictions"] == 144


@pytest.mark.parametrize("wrapped", [1, 2])
def test_padding_is_found_where_a_wrapper_hides_it(wrapped: int) -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: dict[str, Tensor]) -> Any:
            return self.inner(batch) if isinstance(self.inner, Wrapper) else self.inner(**batch)

    batches = text(6)
    for batch in batches:
        batch["attention_mask"][0, 9:] = 0
    sources = []
    for depth in (0, wrapped):
        model: Any = llama()
        for _ in range(depth):
            model = Wrapper(model)

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
            logits = (model(batch) if isinstance(model, Wrapper) else model(**batch)).logits[:, :-1]
            used = batch["attention_mask"][:, 1:].bool()
            return logits[used].square().mean(), int(used.sum())

        sources.append(StructuredSource.capture(model, batches, loss, rank=None))
    plain, hidden = sources
    assert hidden.metadata["tokens"] == plain.metadata["tokens"] == 6 * (16 + 16 + 9)
    for name in plain.names():
        for found, wanted in zip(hidden.factors(f"{'inner.' * wrapped}{name}"), plain.factors(name), strict=True):
            torch.testing.assert_close(found, wanted)


def test_two_layers_with_one_name_are_refused() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self._orig_mod = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

    with pytest.raises(ValueError, match="two linear layers are called 'fc' without the prefixes of wrappers"):
        StructuredSource.capture(Net(), [torch.ones(2, 4)], lambda model, x: model(x).sum())


def test_a_submodule_called_module_is_no_wrapper() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.module = nn.Linear(4, 4), nn.ModuleDict({"fc": nn.Linear(4, 4)})

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.module["fc"](self.fc(x))
            return found

    source = StructuredSource.capture(Net(), [torch.ones(2, 4)], lambda model, x: model(x).sum(), rank=None)
    assert source.names() == ["fc", "module.fc"]


class Small(nn.Module):
    """A residual layer, with operations in place or without, and with or without checkpointing."""

    def __init__(self, reentrant: bool | None = None, in_place: bool = False, kept: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.first, self.second = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.reentrant, self.in_place, self.kept = reentrant, in_place, kept

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embedding(input_ids)
        x = x.mul_(2.0) if self.in_place else x * 2.0
        if self.reentrant is None:
            return self.block(x)
        found: Tensor = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return found

    def block(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x)
        y = self.second(y.relu_() if self.in_place else y.relu())
        return x.add_(y) if self.kept else x + y


def squares(model: nn.Module, passes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
    """Return the mean square of the model's outputs over all tokens that count, of one or several passes."""
    sums = [(model(ids, mask).square().sum(-1) * mask).sum() for ids, mask in passes]
    number = sum(int(mask.sum()) for _, mask in passes)
    return torch.stack(sums).sum() / number, number


def passes(*sizes: tuple[int, int], padding: int = 0) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = [(torch.randint(7, size, generator=generator), torch.ones(size, dtype=torch.int64)) for size in sizes]
    for index, (_, mask) in enumerate(found):
        mask[0, : padding * index] = 0
        mask[1, mask.shape[1] - padding :] = 0
    return found


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_in_eval_mode_gives_the_same(reentrant: bool, padding: int) -> None:
    """Models that checkpoint themselves. Those of transformers are in test_checkpointing.py."""
    batches = [passes((3, 6), padding=padding), passes((4, 5), padding=padding)]
    plain, other = (
        StructuredSource.capture(Small(each), batches, squares, rank=None, modules=["first", "second"])
        for each in (None, reentrant)
    )
    close(other, plain)
    assert other.metadata["tokens"] == plain.metadata["tokens"]


@pytest.mark.parametrize(("sizes", "padding"), [([(3, 6), (3, 6)], 2), ([(3, 6), (6, 3)], 0)])
def test_reentrant_checkpointing_of_different_passes_is_refused(sizes: list[tuple[int, int]], padding: int) -> None:
    batch = passes(*sizes, padding=padding)
    plain, other = (StructuredSource.capture(Small(each), [batch], squares, rank=None) for each in (None, False))
    close(other, plain)
    with pytest.raises(ValueError, match="use_reentrant=False"):
        StructuredSource.capture(Small(True), [batch], squares, rank=None)
    same = passes((3, 6), (3, 6))
    plain, other = (StructuredSource.capture(Small(each), [same], squares, rank=None) for each in (None, True))
    close(other, plain)


def test_a_mask_given_by_position_counts() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Small()

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    def named(model: nn.Module, passes: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, int]:
        ((ids, mask),) = passes
        return squares(lambda *_: model(input_ids=ids, attention_mask=mask), passes)  # type: ignore[arg-type]

    batch = passes((3, 6), padding=2)
    plain = StructuredSource.capture(Small(), [batch], named, rank=None)
    assert plain.metadata["tokens"] == int(batch[0][1].sum())
    for model in (Small(), Wrapper()):
        other = StructuredSource.capture(model, [batch], squares, rank=None)
        assert other.metadata["tokens"] == plain.metadata["tokens"]
        close(other, plain)


def test_operations_in_place_behind_frozen_layers() -> None:
    batch = passes((3, 6))
    plain, other = (
        StructuredSource.capture(Small(in_place=each), [batch], squares, rank=None) for each in (False, True)
    )
    close(other, plain)


def test_a_layer_without_a_gradient_is_not_reached() -> None:
    class Unused(Small):
        def block(self, x: Tensor) -> Tensor:
            self.second(x)
            return x + self.first(x)  # type: ignore[no-any-return]

    with pytest.raises(ValueError, match=r"no batch reached 1 of 2 layers \(second\)"):
        StructuredSource.capture(Unused(), [passes((3, 6))], squares, rank=None)


class Scores(nn.Linear):
    """A layer that returns its output and its best class."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        found = super().forward(x)
        return found, found.argmax(-1)


class TopRouter(Scores):
    """As the routers of Llama 4 and of Phi-3.5-MoE."""


class Chosen(nn.Module):
    def __init__(self, kind: type[Scores]) -> None:
        super().__init__()
        self.first, self.router = nn.Linear(4, 4), kind(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        found: Tensor = x * self.router(x)[0]
        return found


def test_routers_are_no_layers_and_other_layers_of_several_outputs_are_named() -> None:
    rows = [torch.randn(8, 4, generator=torch.Generator().manual_seed(0))]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model(x).square().mean()
        return found

    assert StructuredSource.capture(Chosen(TopRouter), rows, loss, rank=None).names() == ["first"]
    with pytest.raises(ValueError, match=r"router \(Scores\) must return one tensor, found tuple.*leave it out with"):
        StructuredSource.capture(Chosen(Scores), rows, loss, rank=None)
    StructuredSource.capture(Chosen(Scores), rows, loss, rank=None, modules="first")


def test_an_input_that_changed_in_place_is_refused() -> None:
    with pytest.raises(ValueError, match="the input of first was changed in place after the layer"):
        StructuredSource.capture(Small(kept=True), [passes((3, 6))], squares, rank=None)


def test_gradients_of_a_mean_over_many_predictions_do_not_underflow() -> None:
    rows = torch.randn(512, 128, 4, generator=torch.Generator().manual_seed(0)).half()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4)).half()

    def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
        return (model(x).float() * 1e-3).mean(), 512 * 128

    half = StructuredSource.capture(model, [rows], loss, rank=None)
    close(half, StructuredSource.capture(model.float(), [rows.float()], loss, rank=None), 1e-2)


def test_several_passes_need_a_count() -> None:
    def uncounted(model: nn.Module, passes: list[tuple[Tensor, Tensor]]) -> Tensor:
        with torch.no_grad():
            model(passes[0][0])  # labels may be drawn from a pass without gradients
        return squares(model, passes)[0]

    one, two = passes((3, 6)), passes((3, 6), (2, 6))
    plain, other = (StructuredSource.capture(Small(), [one], loss, rank=None) for loss in (squares, uncounted))
    close(other, plain)
    with pytest.raises(ValueError, match="return the mean and the number of predictions"):
        StructuredSource.capture(Small(), [two], uncounted, rank=None)


def test_the_inputs_of_one_batch_are_freed_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[Tensor]] = []
    record = Recorder._record

    def noted(self: Recorder, layer: Any, x: Tensor, output: Tensor) -> None:
        kept.append(weakref.ref(x))
        record(self, layer, x, output)

    def loss(model: nn.Module, batch: Any) -> tuple[Tensor, int]:
        assert not any(each() is not None for each in kept)
        return squares(model, batch)

    monkeypatch.setattr(Recorder, "_record", noted)
    StructuredSource.capture(Small(), [passes((3, 6))] * 3, loss, rank=None)
    assert len(kept) == 6


def test_an_encoder_decoder_needs_the_inputs_of_its_decoder() -> None:
    options = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(
        vocab_size=48, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, **options
    ))  # fmt: skip
    ids = torch.randint(4, 48, (4, 9))
    batch = {"input_ids": ids, "labels": ids[:, :5]}
    with pytest.raises(ValueError, match="needs decoder_input_ids"):
        StructuredSource.capture(model, [batch], sampled_loss, rank=2)
    batch["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(batch["labels"])
    source = StructuredSource.capture(model, [batch], sampled_loss, rank=2)
    assert source.metadata["predictions"] == 20
    batch["decoder_attention_mask"] = torch.ones_like(batch["labels"])
    batch["decoder_attention_mask"][0, 3:] = 0
    with pytest.raises(ValueError, match="without padding"):
        StructuredSource.capture(model, [batch], sampled_loss, rank=2)


def test_bfloat16_models_and_storage() -> None:
    exact = StructuredSource.capture(llama(), text(8), sampled_loss, rank=8)
    stored = exact.to_dtype(torch.bfloat16)
    close(stored, exact, 0.02)
    half = StructuredSource.capture(llama().to(torch.bfloat16), text(8), sampled_loss, rank=8, dtype=torch.bfloat16)
    for name in exact.names():
        assert float((half.factors(name)[0] - exact.factors(name)[0]).norm()) < 0.2 * float(
            exact.factors(name)[0].norm()
        )


def test_float64_models_have_float32_sums() -> None:
    batch = [passes((3, 6), padding=0)]
    found, wanted = (StructuredSource.capture(model, batch, squares, rank=2) for model in (Small().double(), Small()))
    close(found, wanted)


def test_gpt2_layers_keep_inputs_and_outputs_apart() -> None:
    source = StructuredSource.capture(gpt2(), text(2), sampled_loss, rank=None)
    s, g = source.factors("transformer.h.0.attn.c_attn")
    assert s.shape == (2, 16, 16)
    assert g.shape == (2, 48, 48)


@pytest.mark.parametrize(
    ("modules", "count"), [("q_proj", 2), (["q_proj", "*.mlp.*"], 8), ("model.layers.1.self_attn.k_proj", 1)]
)
def test_modules_choose_layers(modules: Any, count: int) -> None:
    assert len(StructuredSource.capture(llama(), text(1), sampled_loss, rank=4, modules=modules).names()) == count


def test_bad_input_is_refused_with_a_reason() -> None:
    model = llama()
    with pytest.raises(ValueError, match="no linear layer is called 'nothing'"):
        StructuredSource.capture(model, text(1), sampled_loss, modules="nothing")
    for part in ("proj", "mlp.*"):
        with pytest.raises(ValueError, match=f"no linear layer is called {re.escape(repr(part))}"):
            StructuredSource.capture(model, text(1), sampled_loss, modules=part)
    with pytest.raises(ValueError, match="modules must name at least one layer, found none"):
        StructuredSource.capture(model, text(1), sampled_loss, modules=[])
    with pytest.raises(ValueError, match="has no linear layer"):
        StructuredSource.capture(nn.Embedding(3, 4), text(1), sampled_loss)
    with pytest.raises(ValueError, match="at least one batch, found none"):
        StructuredSource.capture(model, [], sampled_loss)
    with pytest.raises(ValueError, match="rank must be a whole number of at least 1, or None, found 0"):
        StructuredSource.capture(model, text(1), sampled_loss, rank=0)
    with pytest.raises(ValueError, match=r"must be torch.float32 or torch.bfloat16, found torch.float16"):
        StructuredSource.capture(model, text(1), sampled_loss, dtype=torch.float16)
    with pytest.raises(ValueError, match="must return a scalar tensor"):
        StructuredSource.capture(model, text(1), lambda model, batch: model(**batch).logits)
    with pytest.raises(ValueError, match=r"has a loss of 0\.0 over 0 predictions"):
        StructuredSource.capture(model, text(1), lambda model, batch: 0.0 * model(**batch).logits.sum())
    with pytest.raises(ValueError, match="has a loss of nan"):
        StructuredSource.capture(model, text(1), lambda model, batch: model(**batch).logits.sum() * float("nan"))


def test_a_layer_that_no_batch_reaches_is_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.used(x)
            return out

    with pytest.raises(ValueError, match=r"no batch reached 1 of 2 layers \(unused\)"):
        StructuredSource.capture(Two(), [torch.ones(2, 4)], lambda model, x: model(x).square().mean())


@pytest.mark.parametrize(
    ("used", "unused", "modules"),
    [
        (["0.in", "0.out", "1.in"], ["0.dt", "1.dt"], ["in", "out"]),
        (["text.0.q", "text.1.q"], ["image.0.q", "projector"], "text.*"),
        (["text.q"], ["image.q"], "text.*"),
    ],
)
def test_the_message_about_layers_without_a_batch_names_modules_that_leave_them_out(
    used: list[str], unused: list[str], modules: Any
) -> None:
    class Part(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for name in used:
                x = self.get_submodule(name)(x)
            return x

    model = Part()
    for name in used + unused:
        parent: nn.Module = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = parent.get_submodule(part)
        parent.add_module(name.rpartition(".")[2], nn.Linear(4, 4))

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = model(x).square().mean()
        return found

    rows = [torch.ones(8, 4)]
    with pytest.raises(ValueError, match=re.escape(f"leave them out with modules={modules!r}, or check")):
        StructuredSource.capture(model, rows, loss, rank=None)
    assert set(StructuredSource.capture(model, rows, loss, rank=None, modules=modules).names()) == set(used)
