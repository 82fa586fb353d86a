"""Measure how far a Hugging Face model has moved from the model that it was adapted from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.sources.undisturbed import undisturbed

__all__ = ["drift"]

_POSITIONS = 512
"""Number of positions whose probabilities are in memory at once, two float32 rows of the vocabulary's size each."""


def drift(model: nn.Module, batches: Iterable[Mapping[str, Any]], base: nn.Module | None = None) -> float:
    """Return KL(base || model) of the predictions on a text, in nats per token.

    0 means that the model predicts what the base model predicts. ``metrics()["source_drift"]`` is modelled; this is
    measured, by two forward passes of each batch. Use texts that no source was captured from. Positions that the
    attention mask excludes are left out. Both models are in eval mode meanwhile; modes and gradients stay as they were.
    Under DDP each process has the value of its own batches.

    Args:
        model: a Hugging Face model, with PEFT adapters if ``base`` is None. It may be in a wrapper.
        batches: keyword arguments of the model, such as ``input_ids`` and ``attention_mask``. ``labels`` are not used.
            :func:`own_text` writes such batches.
        base: the model before training. None: the model with its adapters disabled.

    Returns:
        The mean over all positions, for classifiers over all rows.

    Raises:
        ValueError: there is no position, or the logits of the models have different shapes. ``base`` is None, and the
            model has no PEFT adapters, they are merged into its weights, or it also trains weights of the base model.
    """
    adapters = _adapters(model) if base is None else None
    total, count = 0.0, 0
    with ExitStack() as stack:
        for each in (model, base):
            if each is not None:
                stack.enter_context(undisturbed(each, "eval"))
        stack.enter_context(torch.no_grad())  # undisturbed passes have gradients
        for batch in tqdm(batches, desc="measuring drift", unit="batch", leave=False):
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            with nullcontext() if adapters is None else adapters.disable_adapter():
                start = (model if base is None else base)(**inputs).logits
            now = model(**inputs).logits
            if start.shape != now.shape:
                raise ValueError(
                    "the logits of the base and of the model must have one shape, found "
                    f"{tuple(start.shape)} and {tuple(now.shape)}"
                )
            used = _used(now, inputs.get("attention_mask"))
            total += _kl(start[used.to(start.device)].to(now.device), now[used])
            count += int(used.sum())
    if count == 0:
        raise ValueError("batches must hold at least one position, found none; a generator can be read only once")
    return total / count


def _adapters(model: nn.Module) -> Any:
    """Return the PEFT model, which can disable its adapters.

    Raises:
        ValueError: there is none, or the model without adapters is not the base model.
    """
    found: Any = next((module for module in model.modules() if hasattr(module, "disable_adapter")), None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} has no PEFT adapters to disable: pass the model before training, base="
        )
    if any(getattr(module, "merged", False) for module in found.modules()):
        raise ValueError("the adapters are merged into the weights: call unmerge_adapter(), or pass base=")
    prefix = getattr(found.base_model, "prefix", "prompt_encoder")
    trained = [name for name, p in found.named_parameters() if p.requires_grad]
    others = [name for name in trained if prefix not in name and "modules_to_save" not in name]
    if others:
        raise ValueError(
            f"{len(others)} trained parameters are not part of an adapter (first: {others[0]}), so the model without "
            "adapters is not the base model: pass the model before training, base="
        )
    return found


def _kl(start: Tensor, now: Tensor) -> float:
    """Return the sum of KL(start || now) over logits [positions, classes], in nats."""
    total = 0.0
    for before, after in zip(start.split(_POSITIONS), now.split(_POSITIONS), strict=True):
        p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float32))
    return total


def _used(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Return the positions that count: bool, of the shape of the logits without classes."""
    shape = logits.shape[:-1]
    if mask is None or mask.shape != shape:
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    return mask.to(logits.device) != 0
