"""Measure the drift of a model on texts: the KL from its base. (``metrics()["source_drift"]`` is modelled instead.)"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.integrations.predictions import attended, check_classes, predict
from gradguide.sources.structured.layers import MOVING_STARTS, adapter_configs
from gradguide.sources.undisturbed import undisturbed

__all__ = ["drift"]

_POSITIONS = 512
"""Number of positions whose probabilities are in memory at once, two float32 rows of the vocabulary's size each."""


def drift(model: nn.Module, batches: Iterable[Mapping[str, Any]], base: nn.Module | None = None) -> float:
    """Return KL(base || model) of the predictions on a text, in nats per token.

    0 means that the model predicts what the base model predicts. ``metrics()["source_drift"]`` is modelled; this is
    measured, by two forward passes of each batch. Use texts that no source was captured from. Positions that the
    attention mask excludes are left out, or the decoder's attention mask if the batch has ``decoder_input_ids``. The
    predictions are the softmax of the last dimension. Both models run in eval mode. Modes, gradients and adapters are
    restored. Under DDP each process returns the value of its own batches.

    Args:
        model: a Hugging Face model, with PEFT adapters if ``base`` is None. It may be in a wrapper.
        batches: keyword arguments of the model, such as ``input_ids`` and ``attention_mask``, on its device.
            ``labels`` are not used. For instance ``[tokenizer(text, return_tensors="pt") for text in texts]``, or the
            batches of :func:`own_text`.
        base: the model before training, apart from the model. None: the model with its adapters disabled.

    Returns:
        The mean over all positions, for classifiers over all rows. Infinite if the model excludes a token that the base
        predicts.

    Raises:
        TypeError: a batch is not a mapping.
        ValueError: there is no position, the logits of the models have different shapes, one class or NaN, or are of
            several labels per row. The attention mask has another shape. ``base`` has the trained parameters of the
            model. ``base`` is None, and the model has no PEFT adapters, they are merged into its weights, their start
            changed its weights (PiSSA, OLoRA, KaSA, ...), or it also trains weights of the base model. The batch of an
            encoder-decoder has labels [batch, tokens] without ``decoder_input_ids``.
    """
    if base is not None:
        _check_apart(model, base)
    adapters = _adapters(model) if base is None else None
    total, count = 0.0, 0
    with ExitStack() as stack:
        for each in (model, base):
            if each is not None:
                stack.enter_context(undisturbed(each, "eval"))
        stack.enter_context(torch.no_grad())  # undisturbed passes have gradients
        for batch in tqdm(batches, desc="measuring drift", unit="batch", leave=False):
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"a batch must be keyword arguments of the model, found {type(batch).__name__}: pass [batch], not "
                    'batch, and tokenizer(text, return_tensors="pt"), not a text'
                )
            with nullcontext() if adapters is None else _disabled(adapters):
                start = predict(model if base is None else base, batch)
            now = predict(model, batch)
            if start.shape != now.shape:
                raise ValueError(
                    "the logits of the base and of the model must have one shape, found "
                    f"{tuple(start.shape)} and {tuple(now.shape)}"
                )
            check_classes(model, now)
            used = attended(now, batch).to(now.device).flatten().nonzero().squeeze(-1)
            total += _kl(start.flatten(0, -2), now.flatten(0, -2), used)
            count += len(used)
    if count == 0:
        raise ValueError("batches must hold at least one position, found none; a generator can be read only once")
    if math.isnan(total):
        raise ValueError("the logits of the base or of the model hold NaN or inf, so they are not predictions")
    return total / count


def _check_apart(model: nn.Module, base: nn.Module) -> None:
    """Raise ValueError if ``base`` changes with the model. PEFT adds adapters to the model that it is given."""
    of_base, own = set(base.parameters()), list(model.parameters())
    shared = [p for p in own if p in of_base]
    if len(shared) == len(own) or any(p.requires_grad for p in shared):
        raise ValueError(
            f"base shares {len(shared)} of {len(own)} parameters with the model, also trained ones or all: leave out "
            "base= if they are PEFT adapters, else pass a copy from before training, and freeze what both share"
        )


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
    for name, config in adapter_configs(found).items():
        kasa = getattr(config, "kasa_config", None) is not None
        start = "kasa" if kasa else str(getattr(config, "init_lora_weights", ""))
        if kasa or start.startswith(MOVING_STARTS):
            raise ValueError(
                f"the start of the adapter {name!r} ({start}) changed weights of the base model, so the model without "
                "adapters is not the base model: pass the model before training, base="
            )
    own = (getattr(found.base_model, "prefix", "prompt_encoder"), "modules_to_save", "trainable_tokens_")
    # Disabling adapters does not restore the biases that were trained with them.
    biased = any(getattr(config, "bias", "none") not in ("none", None, False) for config in found.peft_config.values())
    others = [
        name
        for name, p in model.named_parameters()
        if (p.requires_grad or (biased and name.endswith("bias"))) and not any(part in name for part in own)
    ]
    if others:
        raise ValueError(
            f"{len(others)} trained parameters are not part of an adapter (first: {others[0]}), so the model without "
            "adapters is not the base model: pass the model before training, base="
        )
    return found


@contextmanager
def _disabled(adapters: Any) -> Iterator[None]:
    """Disable the adapters inside. PEFT enables all adapters afterwards, and trains them: both are restored."""
    trained = [(p, p.requires_grad) for p in adapters.parameters()]
    flags = [(m, m._disable_adapters) for m in adapters.modules() if "_disable_adapters" in vars(m)]
    try:
        with adapters.disable_adapter():
            yield
    finally:
        for module, flag in flags:
            module._disable_adapters = flag
        for parameter, required in trained:
            parameter.requires_grad_(required)


def _kl(start: Tensor, now: Tensor, used: Tensor) -> float:
    """Return the sum of KL(start || now) over the rows ``used`` of logits [positions, classes], in nats."""
    total = 0.0
    for chosen in used.split(_POSITIONS):
        before, after = start[chosen.to(start.device)].to(now.device), now[chosen]
        p, q = before.float().log_softmax(-1), after.float().log_softmax(-1)
        # A class that is excluded by -inf adds nothing.
        total += float((p.exp() * (p - q)).where(p != -math.inf, 0.0).sum(dtype=torch.float32))
    return total
