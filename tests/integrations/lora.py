"""Tiny random language models with LoRA adapters on every linear layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from gradguide import SourceGradient

# transformers reads its own deprecated property when PEFT prepares a model.
QUIET = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
Batch = tuple[Tensor, Tensor]

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def bert(rank: int = 2, seed: int = 0, **options: Any) -> PeftModel:
    torch.manual_seed(seed)
    options = {"target_modules": "all-linear", **options}
    return get_peft_model(BertModel(BertConfig(**SIZES)), LoraConfig(r=rank, **options))


def llama(**options: Any) -> PeftModel:
    torch.manual_seed(0)
    options = {"target_modules": "all-linear", **options}
    return get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), LoraConfig(r=2, **options))


class Classifier(nn.Module):
    """An adapted encoder with a head outside the PEFT model."""

    def __init__(self, encoder: PeftModel, classes: int = 3) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(16, classes)

    def forward(self, ids: Tensor) -> Tensor:
        scores: Tensor = self.head(self.encoder(input_ids=ids).pooler_output)
        return scores


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def examples(seed: int, count: int = 12, size: int = 2) -> list[Batch]:
    """Return batches of token ids whose first token encodes the class."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (count, 6), generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    ids[:, 0] = labels + 3 * seed % 30
    return list(zip(ids.split(size), labels.split(size), strict=True))


def capture(model: Classifier, batches: list[Batch] | None = None) -> SourceGradient:
    """Capture a source of the adapter only, with a frozen head."""
    model.head.requires_grad_(False)
    source = SourceGradient.capture(model, batches or examples(1), cross_entropy)
    model.head.requires_grad_(True)
    return source


def adapters(model: nn.Module, adapter: str = "default") -> dict[nn.Module, list[nn.Parameter]]:
    """Return the LoRA parameters of every adapted layer, found by PEFT's layer class."""
    found: dict[nn.Module, list[nn.Parameter]] = {}
    for module in model.modules():
        if isinstance(module, LoraLayer):
            parts = [getattr(module, name) for name in module.adapter_layer_names]
            owned = [part[adapter] for part in parts if adapter in part]
            found[module] = [
                p for part in owned for p in ([part] if isinstance(part, nn.Parameter) else part.parameters())
            ]
    return found


def move(model: nn.Module, scale: float = 0.1) -> None:
    """Set every B to random values, since B starts at zero."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(scale * torch.randn_like(p))
