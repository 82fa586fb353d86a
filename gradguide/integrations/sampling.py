"""Draw labels and text from a Hugging Face model, to capture a :class:`gradguide.StructuredSource`."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.sources.structured.layers import adapter_configs

__all__ = [
    "DECODER_INPUTS",
    "begins_with_bos",
    "check_classes",
    "check_decoder_inputs",
    "check_length",
    "logits_of",
    "own_text",
    "sampled_loss",
]

DECODER_INPUTS = frozenset({"decoder_input_ids", "decoder_inputs_embeds"})
"""Keyword arguments that determine the positions of an encoder-decoder's predictions."""


_DROPPED = 32
"""Number of tokens after the first one that are dropped where a sequence is a part of a longer text."""


def sampled_loss(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, int]:
    """Return the mean negative log likelihood of labels drawn from the model, and the number of predictions.

    For causal language models, the label of each position is a token drawn from the model's prediction. If the batch
    has ``labels``, only positions whose next label is not -100 are used; otherwise those whose next token is in the
    attention mask [batch, tokens]. Padding is not used. For classifiers (logits [batch, classes]), one class is drawn
    per row. For masked or token models (logits [batch, tokens, classes] of a model that is not causal), one class is
    drawn per used position.

    Args:
        model: a Hugging Face model.
        batch: keyword arguments of the model, such as ``input_ids`` and ``attention_mask``.

    Returns:
        The loss, Tensor [], in nats; and the number of predictions in the mean.

    Raises:
        ValueError: no position is used. The batch of an encoder-decoder has labels [batch, tokens] without
            ``decoder_input_ids``: the model is not given the labels, so it cannot derive them. The logits are not those
            of one class of several: a regression, or several labels per row. They have other positions than the mask.
            There are none, as without a head.
    """
    labels: Tensor | None = batch.get("labels")
    name = "decoder_attention_mask" if DECODER_INPUTS & batch.keys() else "attention_mask"
    mask: Tensor | None = batch.get(name)
    check_decoder_inputs(model, batch)
    output = model(**{key: value for key, value in batch.items() if key != "labels"})
    logits = without_prompt(model, logits_of(output), batch)
    check_classes(model, logits)
    if logits.dim() > 2 and mask is not None and mask.dim() == 2:
        if mask.shape != logits.shape[:-1]:
            raise ValueError(
                f"{name} must have the shape of the predictions {tuple(logits.shape[:-1])}, found {tuple(mask.shape)}"
            )
        used = seen = mask.bool()
    else:
        used = seen = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)
    if logits.dim() > 2 and labels is not None:
        used = labels != -100
    if logits.dim() > 2 and _is_causal(model):
        # Padding on the left predicts nothing.
        logits, used = logits[:, :-1], used[:, 1:] & seen[:, :-1].to(used.device)
    number = int(used.sum())
    if number == 0:
        raise ValueError("no position of the batch counts: its labels are all -100, or its attention mask all 0")
    chosen = logits[used.to(logits.device)].float()
    drawn = torch.multinomial(chosen.detach().softmax(-1), 1).squeeze(-1)
    return nn.functional.cross_entropy(chosen, drawn), number


@torch.no_grad()
def own_text(
    model: nn.Module, tokenizer: Any, *, tokens: int, seed: int = 0, length: int = 96, batch_size: int = 8
) -> list[dict[str, Tensor]]:
    """Generate source text with a causal language model, sampled at temperature 1.

    Sequences start as texts do in use, because the first token of a text has inputs and gradients of its own kind. If
    the tokenizer puts its BOS token before a text, each sequence is a text from that token on. If it has one and does
    not, as with chat templates, every second one is; the others are parts of longer texts. Without a BOS token all are
    parts, of texts after the EOS token, or after a random token if there is none.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer; it is also called with a text.
        tokens (int): total number of tokens, at least ``length``.
        seed (int): seed of the sampling. torch's global random state does not change.
        length (int): tokens per sequence.
        batch_size (int): sequences per batch.

    Returns:
        Batches for :func:`sampled_loss`: ``input_ids`` and ``attention_mask``, int64 [batch_size, length].

    Raises:
        ValueError: ``tokens`` is less than ``length``, ``length`` is less than 2, or ``batch_size`` is less than 1.
            ``length`` is more than the positions of the model, or the model is not a causal language model.
    """
    if _class(model)[0] and not _is_causal(model):
        raise ValueError(
            f"own text needs a causal language model, found {_class(model)[0]}, which does not continue a text: give "
            "StructuredSource.capture batches of texts instead"
        )
    check_length(model, length)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, found {batch_size}")
    if tokens < length:
        raise ValueError(f"tokens must be at least length={length}, found {tokens}")
    generator = torch.Generator(device=next(model.parameters()).device).manual_seed(seed)
    bos, count = tokenizer.bos_token_id, -(-tokens // length)
    every = 0 if bos is None else 1 if begins_with_bos(tokenizer) else 2
    dropped = 0 if every == 1 else int(min(1 + _DROPPED, _positions(model) - length))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    batches = []
    try:
        with tqdm(total=count * length, desc="writing source text", unit="token", leave=False) as bar:
            for first in range(0, count, batch_size):
                rows = range(first, min(first + batch_size, count))
                text = _generate(model, _starts(model, tokenizer, len(rows), generator), generator, dropped + length)
                skipped = [0 if every and row % every == 0 else dropped for row in rows]
                ids = torch.stack([row[skip : skip + length] for row, skip in zip(text, skipped, strict=True)])
                batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
                bar.update(ids.numel())
    finally:
        for module, training in modes.items():
            module.training = training
    return batches


def check_length(model: nn.Module, length: int) -> None:
    """Raise ValueError if a language model cannot take sequences of ``length`` tokens, or predicts nothing in them."""
    if length < 2:
        raise ValueError(f"length must be at least 2, because the first token predicts the next, found {length}")
    if length > (longest := _positions(model)):
        raise ValueError(f"length must be at most {longest}, the positions of the model, found {length}")


def _positions(model: nn.Module) -> float:
    return getattr(getattr(_unwrapped(model), "config", None), "max_position_embeddings", None) or math.inf


def begins_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts its BOS token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def _starts(model: nn.Module, tokenizer: Any, rows: int, generator: torch.Generator) -> Tensor:
    """Return the token before each text, int64 [rows, 1]: BOS, else EOS, else a random one."""
    found = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    if found is not None:
        return torch.full((rows, 1), found, device=generator.device)
    # A tokenizer with added tokens may be larger than the model's vocabulary.
    get: Any = getattr(_unwrapped(model), "get_input_embeddings", None)
    size = min(len(tokenizer), get().num_embeddings) if callable(get) else len(tokenizer)
    return torch.randint(size, (rows, 1), generator=generator, device=generator.device)


def _generate(model: Any, ids: Tensor, generator: torch.Generator, length: int) -> Tensor:
    """Return texts that continue ``ids`` [rows, 1]: int64 [rows, length]."""
    known = inspect.signature(_unwrapped(model).forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # the name in earlier versions of transformers
    # PEFT puts a learned prompt before each input, or in the place of the cache, so all tokens are read again.
    cached = not _has_prompt(model)
    inputs, cache = ids, None
    while ids.shape[1] < length:
        output = model(input_ids=inputs, use_cache=cached, **({} if cache is None else {name: cache}))
        cache = getattr(output, name, None) if cached else None
        probabilities = output.logits[:, -1].float().softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
        inputs = drawn if cache is not None else ids
    return ids


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output. Raise ValueError if it has none."""
    found = getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the model's output must have logits, found {type(output).__name__}: give a model with a head, such as "
            "AutoModelForCausalLM loads. For other predictions write the loss yourself"
        )
    return found


def without_prompt(model: nn.Module, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Return the logits of the batch's own tokens. Prompt tuning has learned tokens before them."""
    if logits.dim() < 3 or not _has_prompt(model):
        return logits
    own = next((batch[key] for key in (*DECODER_INPUTS, "input_ids", "inputs_embeds") if key in batch), logits)
    return logits[:, -own.shape[1] :]


def _has_prompt(model: nn.Module) -> bool:
    """Return whether an adapter puts learned tokens, or their keys and values, before the text."""
    return any(getattr(config, "is_prompt_learning", False) for config in adapter_configs(model).values())


def _is_causal(model: nn.Module) -> bool:
    """Return whether the logits of a position are those of the next token.

    The decoder of an encoder-decoder is given shifted labels, so its logits are those of the labels' positions.
    """
    if _is_encoder_decoder(model):
        return False
    name, config = _class(model)
    if name.endswith(("ForConditionalGeneration", "ForMultimodalLM", "2Text")):
        return not getattr(config, "is_encoder_decoder", False)
    return "CausalLM" in name or "LMHead" in name


def _class(model: nn.Module) -> tuple[str, Any]:
    """Return the name of the class that decides what the logits are, and its configuration; "" if there is none.

    A configuration may keep the architecture of the checkpoint that the weights came from, so classes come first.
    """
    found = [(type(module).__name__, module.config) for module in model.modules() if hasattr(module, "config")]
    names = [(name, config) for name, config in found if re.search(r"For[A-Z]|LMHead", name)]
    names.sort(key=lambda each: each[0].startswith("PeftModel"))  # its name is of the task_type that was given
    names += [(name, config) for _, config in found for name in getattr(config, "architectures", None) or ()]
    return names[0] if names else ("", None)


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


def check_decoder_inputs(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Raise ValueError if the batch of an encoder-decoder has labels [batch, tokens] without decoder inputs."""
    labels: Tensor | None = batch.get("labels")
    if labels is not None and labels.dim() > 1 and not DECODER_INPUTS & batch.keys() and _is_encoder_decoder(model):
        raise ValueError(
            "the batch of an encoder-decoder needs decoder_input_ids beside labels, found none: add "
            "model.prepare_decoder_input_ids_from_labels(labels), or let the collator do so"
        )


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(_config(model), "is_encoder_decoder", False))


def _config(model: nn.Module) -> Any:
    """Return the configuration of a model, which may be in a wrapper; None if there is none."""
    return next((module.config for module in model.modules() if hasattr(module, "config")), None)


def _unwrapped(model: Any) -> Any:
    get = getattr(model, "get_base_model", None)
    return get() if callable(get) else model
