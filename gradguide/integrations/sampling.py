"""Draw labels and text from a Hugging Face model, to capture a :class:`gradguide.StructuredSource`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from gradguide.integrations.predictions import (
    attended,
    check_classes,
    has_prompt,
    head_class,
    is_causal,
    predict,
    unwrapped,
)

__all__ = ["begins_with_bos", "check_length", "own_text", "sampled_loss"]

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
    logits = predict(model, batch)
    check_classes(model, logits)
    labels: Tensor | None = batch.get("labels")
    seen = attended(logits, batch, allow_square=True)
    used = labels != -100 if logits.dim() > 2 and labels is not None else seen
    if logits.dim() > 2 and is_causal(model):
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
            ``length`` is more than the positions of the model, or the model is not a causal language model. The model
            has no embedding of the tokenizer's BOS token, or of EOS if there is no BOS.
    """
    kind = head_class(model)[0]
    if kind and not is_causal(model):
        raise ValueError(
            f"own text needs a causal language model, found {kind}, which does not continue a text: give "
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
    return getattr(getattr(unwrapped(model), "config", None), "max_position_embeddings", None) or math.inf


def begins_with_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts its BOS token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"][:1]) == [bos]


def _starts(model: nn.Module, tokenizer: Any, rows: int, generator: torch.Generator) -> Tensor:
    """Return the token before each text, int64 [rows, 1]: BOS, else EOS, else a random one."""
    found = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), None)
    # A tokenizer with added tokens may be larger than the model's vocabulary.
    get: Any = getattr(unwrapped(model), "get_input_embeddings", None)
    size = get().num_embeddings if callable(get) else math.inf
    if found is None:
        return torch.randint(int(min(len(tokenizer), size)), (rows, 1), generator=generator, device=generator.device)
    if found >= size:
        raise ValueError(
            f"the tokenizer's first token has id {found}, and the model has {size} embeddings: call "
            "model.resize_token_embeddings(len(tokenizer)), or pass the tokenizer that belongs to the model"
        )
    return torch.full((rows, 1), found, device=generator.device)


def _generate(model: Any, ids: Tensor, generator: torch.Generator, length: int) -> Tensor:
    """Return texts that continue ``ids`` [rows, 1]: int64 [rows, length]."""
    known = inspect.signature(unwrapped(model).forward).parameters
    name = "cache" if "cache" in known else "past_key_values"  # the name in earlier versions of transformers
    # PEFT puts a learned prompt before each input, or in the place of the cache, so all tokens are read again.
    cached = not has_prompt(model)
    inputs, cache = ids, None
    while ids.shape[1] < length:
        output = model(input_ids=inputs, use_cache=cached, **({} if cache is None else {name: cache}))
        cache = getattr(output, name, None) if cached else None
        probabilities = output.logits[:, -1].float().softmax(-1)
        drawn = torch.multinomial(probabilities, 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
        inputs = drawn if cache is not None else ids
    return ids
