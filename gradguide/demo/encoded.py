"""Texts as padded batches of token numbers; tokenised once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .data import Example

__all__ = ["Batch", "Encoded", "encode"]

# input_ids and attention_mask, int64 [b, t], and labels, int64 [b].
Batch = dict[str, Tensor]

_MAX_TOKENS = 128


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """Tokenised rows: row i has the token numbers ``tokens[i]`` and the class ``labels[i]``."""

    tokens: tuple[list[int], ...]
    labels: tuple[int, ...]
    pad: int
    device: torch.device

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The given rows, padded at the right to the longest of them."""
        longest = max(len(self.tokens[row]) for row in rows)
        ids = torch.full((len(rows), longest), self.pad)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            length = len(self.tokens[row])
            ids[place, :length] = torch.tensor(self.tokens[row])
            mask[place, :length] = 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([self.labels[row] for row in rows])}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def by_length(self, size: int) -> Iterator[Batch]:
        """Every row once, in batches of ``size`` of similar length, so that little is padded."""
        order = sorted(range(len(self)), key=lambda row: len(self.tokens[row]))
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])


def encode(
    examples: Sequence[Example],
    labels: Sequence[str],
    tokenizer: Any,
    device: torch.device,
    *,
    max_tokens: int = _MAX_TOKENS,
) -> Encoded:
    """``examples`` cut to ``max_tokens``; the class of a row is the place of its label in ``labels``."""
    number = {label: place for place, label in enumerate(labels)}
    tokens = tokenizer([example.text for example in examples], truncation=True, max_length=max_tokens)["input_ids"]
    return Encoded(
        tokens=tuple(tokens),
        labels=tuple(number[example.label] for example in examples),
        # Decoders may have no padding token; any number does, because the attention mask hides it.
        pad=tokenizer.pad_token_id or 0,
        device=device,
    )
