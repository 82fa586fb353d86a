"""The predictions of a Hugging Face model for a batch, and which of them count."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gradguide.sources.structured.layers import adapter_configs

__all__ = ["attended", "check_classes", "has_prompt", "head_class", "is_causal", "predict", "unwrapped"]

_DECODER_INPUTS = frozenset({"decoder_input_ids", "decoder_inputs_embeds"})
"""Keyword arguments that determine the positions of an encoder-decoder's predictions."""


def predict(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits of a batch's own tokens, from all of its entries except ``labels``.

    Prompt tuning has learned tokens before them.

    Raises:
        ValueError: the batch of an encoder-decoder has labels [batch, tokens] without decoder inputs. The output has no
            logits, as without a head.
    """
    labels: Tensor | None = batch.get("labels")
    if labels is not None and labels.dim() > 1 and not _DECODER_INPUTS & batch.keys() and _is_encoder_decoder(model):
        raise ValueError(
            "the batch of an encoder-decoder needs decoder_input_ids beside labels, found none: add "
            "model.prepare_decoder_input_ids_from_labels(labels), or let the collator do so"
        )
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise ValueError(
            f"the model's output must have logits, found {type(output).__name__}: give a model with a head, such as "
            "AutoModelForCausalLM loads. For other predictions write the loss yourself"
        )
    if logits.dim() < 3 or not has_prompt(model):
        return logits
    own = next((batch[key] for key in (*_DECODER_INPUTS, "input_ids", "inputs_embeds") if key in batch), logits)
    return logits[:, -own.shape[1] :]


def attended(logits: Tensor, batch: Mapping[str, Any], *, allow_square: bool = False) -> Tensor:
    """Return whether the attention mask includes each position: bool, the shape of the logits without their last size.

    It is the decoder's attention mask if the batch has decoder inputs. Without a mask, and for classifiers, all are
    included.

    Args:
        allow_square: include all positions under a mask of other dimensions, such as [batch, 1, tokens, tokens].

    Raises:
        ValueError: the mask has another shape.
    """
    shape = logits.shape[:-1]
    name = "decoder_attention_mask" if _DECODER_INPUTS & batch.keys() else "attention_mask"
    mask: Tensor | None = batch.get(name)
    if mask is None or len(shape) == 1 or (allow_square and mask.dim() != 2):
        return torch.ones(shape, dtype=torch.bool, device=logits.device)
    if mask.shape != shape:
        raise ValueError(f"{name} must have the shape of the predictions {tuple(shape)}, found {tuple(mask.shape)}")
    return mask.bool()


def check_classes(model: nn.Module, logits: Tensor) -> None:
    """Raise ValueError if the logits are not those of one class of several."""
    if logits.shape[-1] < 2:
        raise ValueError(f"the logits must have 2 classes or more, found {logits.shape[-1]}: is it a regression?")
    kind = getattr(_config(model), "problem_type", None)
    if kind not in (None, "single_label_classification"):
        raise ValueError(
            f"the model must predict one class of several, found {kind!r}: its predictions are not a softmax, so write "
            "a loss that draws its labels and returns their mean loss and number"
        )


def has_prompt(model: nn.Module) -> bool:
    """Return whether an adapter puts learned tokens, or their keys and values, before the text."""
    return any(getattr(config, "is_prompt_learning", False) for config in adapter_configs(model).values())


def is_causal(model: nn.Module) -> bool:
    """Return whether the logits of a position are those of the next token.

    The decoder of an encoder-decoder is given shifted labels, so its logits are those of the labels' positions.
    """
    if _is_encoder_decoder(model):
        return False
    name, config = head_class(model)
    if name.endswith(("ForConditionalGeneration", "ForMultimodalLM", "2Text")):
        return not getattr(config, "is_encoder_decoder", False)
    return "CausalLM" in name or "LMHead" in name


def head_class(model: nn.Module) -> tuple[str, Any]:
    """Return the name of the class that decides what the logits are, and its configuration; "" if there is none.

    A configuration may keep the architecture of the checkpoint that the weights came from, so classes come first.
    """
    found = [(type(module).__name__, module.config) for module in model.modules() if hasattr(module, "config")]
    names = [(name, config) for name, config in found if re.search(r"For[A-Z]|LMHead", name)]
    # A PeftModel has the name of the task_type that was given. fully_shard puts FSDP before a name.
    names.sort(key=lambda each: "PeftModel" in each[0])
    names += [(name, config) for _, config in found for name in getattr(config, "architectures", None) or ()]
    return names[0] if names else ("", None)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(_config(model), "is_encoder_decoder", False))


def _config(model: nn.Module) -> Any:
    """Return the configuration of a model, which may be in a wrapper; None if there is none."""
    return next((module.config for module in model.modules() if hasattr(module, "config")), None)


def unwrapped(model: Any) -> Any:
    """Return the model inside a PEFT model, or the model itself."""
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model
