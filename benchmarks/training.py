"""Time whole training steps, and the share of them that GradGuide adds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from benchmarks.harness import BASELINE, Result, summarise, synchronise
from benchmarks.sets import LLAMAS
from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient, StructuredSource
from gradguide.sources.loss_value import Loss

__all__ = ["llama_step", "minilm_step"]

_RATE = 1e-3


def guided(trained: list[nn.Parameter], named: list[tuple[str, nn.Parameter]]) -> dict[str, Optimizer]:
    """Return the baseline and three GradGuides.

    At a lower rate the bound is proven to hold, and the update is not measured.
    """

    def adamw() -> AdamW:
        return AdamW(trained, lr=_RATE, fused=True)

    anchor = {name: p.detach().float().clone() for name, p in named}
    fisher = {name: torch.full_like(p, 1e-6) for name, p in anchor.items()}
    moving = SourceGradient({n: torch.zeros_like(p) for n, p in anchor.items()}, fisher=fisher, anchor=anchor)
    return {
        BASELINE: adamw(),
        "direction + source + clipping": GradGuide(
            adamw(),
            direction=Direction(),
            alignment=Alignment(SourceGradient(fisher), on="gradient", weight=1.0),
            magnitude=Magnitude(max_update=None),
            names=named,
        ),
        "defaults, no source": GradGuide(adamw()),
        "defaults, anchored source": GradGuide(adamw(), alignment=Alignment(moving.anchored()), names=named),
    }


def time_training(
    label: str, rounds: int, loss: Callable[[], Tensor], trained: list[nn.Parameter], optimizers: dict[str, Optimizer]
) -> list[Result]:
    """Time forward and backward, and the optimizer's part, in each step; optimizers take turns.

    The parameters return to their start after each step, so that all optimizers get the same gradients.
    """
    initial = [p.detach().clone() for p in trained]
    whole: dict[str, list[float]] = {name: [] for name in optimizers}
    part: dict[str, list[float]] = {name: [] for name in optimizers}
    for index in tqdm(range(rounds + 5), desc=label, leave=False):
        for name, optimizer in optimizers.items():
            synchronise()
            start = time.perf_counter()
            optimizer.zero_grad()
            loss().backward()
            synchronise()
            backward = time.perf_counter()
            if name == BASELINE:
                nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            synchronise()
            end = time.perf_counter()
            with torch.no_grad():
                for p, value in zip(trained, initial, strict=True):
                    p.copy_(value)
            if index >= 5:
                whole[name].append(1e3 * (end - start))
                part[name].append(1e3 * (end - backward))
    count = sum(p.numel() for p in trained)
    results = [summarise(label, "model", "trained parameters", "count", [float(count)])]
    for name in optimizers:
        added = [100 * (a - b) / t for a, b, t in zip(part[name], part[BASELINE], whole[name], strict=True)]
        results.append(summarise(label, name, "whole step", "ms", whole[name]))
        results.append(summarise(label, name, "optimizer's part", "ms", part[name]))
        results.append(summarise(label, name, "share of the step that guiding adds", "%", added))
    return results


def minilm_step(rounds: int, label: str) -> list[Result]:
    """Time all-MiniLM-L6-v2 with LoRA on all linear layers, on a batch of 16 texts of 32 tokens."""
    from gradguide.demo.config import DEFAULT_MODEL
    from gradguide.demo.model import Classifier, add_lora, load_encoder
    from gradguide.integrations.peft import lora_parameters

    encoder, _ = load_encoder(DEFAULT_MODEL)
    model = Classifier(add_lora(encoder, seed=0), 384)
    model.add_head("target", 15, 0)
    model.train()
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(1000, 20000, (16, 32), generator=generator),
        "attention_mask": torch.ones(16, 32, dtype=torch.long),
        "labels": torch.randint(15, (16,), generator=generator),
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizers = guided(trained, lora_parameters(model))
    return time_training(label, rounds, lambda: model.loss("target", batch), trained, optimizers)


def llama_step(
    rounds: int,
    label: str,
    device: torch.device,
    *,
    size: str = "1.1B",
    layers: int | None = None,
    batch: tuple[int, int] = (4, 512),
    rank: int = 64,
) -> list[Result]:
    """Time a Llama in bfloat16 with random weights and LoRA of rank 16 on all linear layers.

    Args:
        size: a key of ``LLAMAS``.
        layers: number of layers, by default that of the size.
        batch: sequences and tokens of each.
        rank: rank of the structured source, which is stored in bfloat16.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from gradguide.integrations.peft import lora_parameters
    from gradguide.integrations.sampling import sampled_loss

    shape = LLAMAS[size]
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv * shape.heads // shape.hidden,
    )
    torch.manual_seed(0)
    with device:
        plain = LlamaForCausalLM(config).to(torch.bfloat16)
    model: Any = get_peft_model(plain, LoraConfig(r=16, target_modules="all-linear"), autocast_adapter_dtype=False)
    tokens = torch.randint(config.vocab_size, batch, device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}] * 16

    def loss() -> Tensor:
        return model(input_ids=tokens, labels=tokens).loss  # type: ignore[no-any-return]

    source, times = time_capture(model, batches, sampled_loss, rank, lambda: loss().backward())
    optimizers = guided(trained, list(lora_parameters(model)))
    base = AdamW(trained, lr=_RATE, fused=True)
    optimizers["defaults, structured source"] = GradGuide(base, alignment=Alignment(source), names=model)
    results = [
        summarise(label, "structured source", "capture / forward and backward", "ratio", times),
        summarise(label, "structured source", "size of the file", "MiB", [file_size(source) / 2**20]),
    ]
    return results + time_training(label, rounds, loss, trained, optimizers)


def file_size(source: StructuredSource) -> int:
    """Return the number of bytes of the saved source."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "source.safetensors"
        source.save(path)
        return path.stat().st_size


def time_capture(
    model: nn.Module, batches: list[Any], loss: Loss, rank: int, plain: Callable[[], None]
) -> tuple[StructuredSource, list[float]]:
    """Capture twice, and return the source and its times as multiples of plain passes over the batches."""
    ratios = []
    plain()
    for _ in range(2):
        synchronise()
        start = time.perf_counter()
        for _ in batches:
            plain()
        synchronise()
        between = time.perf_counter()
        source = StructuredSource.capture(model, batches, loss, rank=rank, dtype=torch.bfloat16)
        synchronise()
        ratios.append((time.perf_counter() - between) / (between - start))
    return source, ratios
