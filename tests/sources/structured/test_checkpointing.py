"""Layers with gradient checkpointing on are recomputed while they are captured in eval mode, with equal factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BartConfig, BartForConditionalGeneration, OPTConfig, OPTForCausalLM

from gradguide import SourceGradient
from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from tests.sources.structured.problems import adapted, gpt2, llama, spread, text
from tests.sources.structured.test_capture import close

DROPOUT = 0.5


def opt() -> Any:
    """Return a model whose layers call functional dropout by their own mode, and which drops layers."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=48, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, dropout=DROPOUT,
        layerdrop=DROPOUT, max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(config)


def bart() -> Any:
    """Return an encoder-decoder, whose decoder layers get the encoder's output by keyword."""
    options = {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=48, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, dropout=DROPOUT,
        encoder_layerdrop=DROPOUT, **options,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


class OldLayer(nn.Module):
    """A layer with functional dropout and a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor, *, bias: Tensor) -> tuple[Tensor, None]:
        y = nn.functional.dropout(torch.tanh(self.up(x)) + bias, DROPOUT, training=self.training)
        return x + self.down(y), None


class OldModel(nn.Module):
    """A model that checkpoints as those of transformers before version 4.53: in the module that holds the layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.bias = nn.Embedding(48, 16), nn.Linear(16, 24)
        self.layers = nn.ModuleList([OldLayer(), OldLayer()])
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = checkpoint

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any]) -> None:
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = lambda *given: checkpoint(*given, **gradient_checkpointing_kwargs)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = nn.functional.dropout(self.embedding(input_ids), DROPOUT, training=self.training)
        bias = self.bias(x)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                (x, _) = self._gradient_checkpointing_func(layer.__call__, x, bias)
            else:
                (x, _) = layer(x, bias=bias)
        return x


def fixed(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Return a loss without random numbers. Its count is that of the tokens."""
    found = model(**batch)
    values = found if isinstance(found, Tensor) else found.logits
    return values.float().square().mean(), batch["input_ids"].numel()


def batches_of(model: nn.Module) -> list[dict[str, Tensor]]:
    batches = text(3)
    if isinstance(model, BartForConditionalGeneration):
        return [{**batch, "decoder_input_ids": batch["input_ids"].flip(1)} for batch in batches]
    batches[1]["attention_mask"][0, -4:] = 0
    return batches


@contextmanager
def counted(model: nn.Module) -> Iterator[dict[str, int]]:
    """Count the calls of the modules that only checkpointed layers contain: the first linear layer of each."""
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.named_modules():
        if name.endswith(("layers.0.self_attn", "layers.1.self_attn", "h.0.attn", "layers.0.up", "layers.1.up")):
            calls[name] = 0

            def count(*_: Any, name: str = name) -> None:
                calls[name] += 1

            handles.append(module.register_forward_pre_hook(count))
    yield calls
    for handle in handles:
        handle.remove()


def lora() -> Any:
    return adapted(llama(), lora_dropout=DROPOUT)


def whole() -> Any:
    return llama()


MODELS: list[Callable[[], Any]] = [whole, lora, gpt2, opt, bart, OldModel]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("make", MODELS)
def test_layers_are_recomputed_and_factors_are_equal(make: Callable[[], Any], reentrant: bool) -> None:
    model = make()
    plain = StructuredSource.capture(model, batches_of(model), fixed, rank=None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    model.get_submodule(next(name for name, each in model.named_modules() if isinstance(each, nn.Linear))).eval()
    modes = [module.training for module in model.modules()]
    caching = [getattr(getattr(module, "config", None), "use_cache", None) for module in model.modules()]
    with counted(model) as calls:
        other = StructuredSource.capture(model, batches_of(model), fixed, rank=None)
    close(other, plain)
    assert other.metadata["tokens"] == plain.metadata["tokens"]
    assert calls
    assert set(calls.values()) == {2 * 3}
    assert [module.training for module in model.modules()] == modes
    assert [getattr(getattr(module, "config", None), "use_cache", None) for module in model.modules()] == caching
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_of_adapters_are_equal(reentrant: bool) -> None:
    """Under reentrant checkpointing too, although the inputs of the first layer require no gradient."""
    model: Any = lora()
    spread(model, 0.1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return fixed(model, batch)[0]

    plain = SourceGradient.capture(model, text(3), loss, curvature=False)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with suppress(AttributeError):  # earlier versions of transformers do not enable them
        model.get_base_model().disable_input_require_grads()
    with counted(model) as calls:
        other = SourceGradient.capture(model, text(3), loss, curvature=False)
    at = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    found, wanted = (source.row(list(at), list(at.values())).offset for source in (other, plain))
    assert found is not None
    assert wanted is not None
    torch.testing.assert_close(list(found), list(wanted), rtol=1e-4, atol=1e-7)
    assert list(calls.values()) == [3, 6]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("make", [whole, gpt2])
def test_a_loss_that_asks_for_a_cache_gets_one_and_equal_factors(make: Callable[[], Any]) -> None:
    model = make()

    def cached(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
        return fixed(model, {**batch, "use_cache": True})  # type: ignore[dict-item]

    plain = StructuredSource.capture(model, text(2), cached, rank=None)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    close(StructuredSource.capture(model, text(2), cached, rank=None), plain)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_a_forward_that_was_replaced_is_called_and_restored() -> None:
    model = llama()
    layer = model.model.layers[0]
    forward, calls = layer.forward, []

    def replaced(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return forward(*arguments, **keywords)

    layer.forward = replaced
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with pytest.raises(RuntimeError, match="no more memory"):
        StructuredSource.capture(model, text(1), _fails, rank=None)
    assert layer.forward is replaced
    assert model.config.use_cache is True
    StructuredSource.capture(model, text(1), sampled_loss, rank=None)
    assert layer.forward is replaced
    assert len(calls) == 2


def _fails(model: nn.Module, batch: Any) -> Tensor:
    raise RuntimeError("no more memory")
