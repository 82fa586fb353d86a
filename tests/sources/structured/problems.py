"""Small models with linear layers, and a dense quadratic form of a source."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gradguide.sources.structured import StructuredSource
from gradguide.sources.structured.layers import find_layers
from gradguide.utils.names import model_names

VOCABULARY = 48


def llama(layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    """Return a random causal language model whose predictions are not uniform."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return _sharpened(LlamaForCausalLM(config))


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Return a random GPT-2, whose layers store transposed weights."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, resid_pdrop=0.0)
    return _sharpened(GPT2LMHeadModel(config))


def adapted(model: nn.Module, r: int = 4, **options: Any) -> nn.Module:
    """Add a LoRA adapter to all linear layers."""
    given = {"r": r, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    wrapped: nn.Module = get_peft_model(model, LoraConfig(**given))
    return wrapped


def text(batches: int = 12, rows: int = 3, length: int = 16, seed: int = 1) -> list[dict[str, Tensor]]:
    """Return batches of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "input_ids": torch.randint(VOCABULARY, (rows, length), generator=generator),
            "attention_mask": torch.ones(rows, length, dtype=torch.int64),
        }
        for _ in range(batches)
    ]


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by canonical name."""
    return {name: p for name, p in model_names(model).items() if p.requires_grad}


def spread(model: nn.Module, size: float, seed: int = 3) -> None:
    """Add random noise to every trained parameter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(size * torch.randn(p.shape, generator=generator))


def energy(source: StructuredSource, model: nn.Module, starts: dict[str, Tensor], values: dict[str, Tensor]) -> Tensor:
    """Return ``1/2 sum tr(D^T (G + floor I) D S)`` with dense D in float64, as a function of ``values`` by name."""
    names = {id(p): name for name, p in model_names(model).items()}
    total = torch.zeros((), dtype=torch.float64)
    for name, layer in find_layers(model).items():
        if name not in source.names():
            continue
        s, g = (factor.double() for factor in source.factors(name))
        held = source._layers[name]
        d = torch.zeros(layer.shape, dtype=torch.float64)
        for adapter in layer.adapters:
            a, b = (values.get(names[id(p)], p.detach().double()) for p in (adapter.a, adapter.b))
            d = d + adapter.scale * b @ a
        if layer.trained:
            moved = values[names[id(layer.weight)]] - starts[names[id(layer.weight)]].double()
            d = d + (moved.T if layer.transposed else moved)
        if held.anchor is not None:
            d = d - held.anchor[0].double() @ held.anchor[1].double()
        floor = source.floor / held.scale * torch.eye(layer.shape[0], dtype=torch.float64)
        total = total + 0.5 * (d.T @ (g + floor) @ d @ s).diagonal(dim1=-2, dim2=-1).sum()
    return total


def _sharpened(model: Any) -> Any:
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p *= 4.0
    return model
