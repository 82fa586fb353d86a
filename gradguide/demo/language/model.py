"""A causal language model that classifies by the likelihood of a label's words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from gradguide.demo.data import Example
from gradguide.demo.model import loading
from gradguide.integrations.causal import load_causal
from gradguide.integrations.sampling import begins_with_bos

__all__ = ["Batch", "Rows", "accuracy", "encode", "is_causal", "load_model"]

Batch = dict[str, Tensor]

_TEXT_TOKENS = 64
_BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokenized rows: prompt i is followed by the words ``answers[labels[i]]``.

    Args:
        prompts: token ids of each row.
        labels: class of each row.
        answers: token ids of each class.
    """

    prompts: tuple[list[int], ...]
    labels: tuple[int, ...]
    answers: tuple[list[int], ...]
    device: torch.device

    def __len__(self) -> int:
        return len(self.prompts)

    def batch(self, rows: Sequence[int]) -> Batch:
        """Return rows with their own labels."""
        return self._padded([(row, self.labels[row]) for row in rows])

    def candidates(self) -> Iterator[Batch]:
        """Yield every row with every label, row by row, in batches."""
        pairs = [(row, label) for row in range(len(self)) for label in range(len(self.answers))]
        for start in range(0, len(pairs), _BATCH):
            yield self._padded(pairs[start : start + _BATCH])

    def _padded(self, pairs: Sequence[tuple[int, int]]) -> Batch:
        """Return ids, mask and labels, int64 [b, t], padded on the right. Labels are -100 except for the answer."""
        ids = [torch.tensor(self.prompts[row] + self.answers[label]) for row, label in pairs]
        labels = [each.clone() for each in ids]
        for target, (row, _) in zip(labels, pairs, strict=True):
            target[: len(self.prompts[row])] = -100
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}


def encode(examples: Sequence[Example], labels: Sequence[str], tokenizer: Any, device: torch.device) -> Rows:
    """Tokenize rows as ``text``, a line ``Label:``, and the words of the label, after BOS if the tokenizer puts it."""

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    head = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
    ending = tokens("\nLabel:")
    return Rows(
        prompts=tuple(head + tokens(example.text)[:_TEXT_TOKENS] + ending for example in examples),
        labels=tuple(labels.index(example.label) for example in examples),
        answers=tuple(tokens(" " + label.replace("_", " ")) for label in labels),
        device=device,
    )


@torch.inference_mode()
def accuracy(model: nn.Module, rows: Rows) -> float:
    """Return the share of rows whose own label has the highest mean log likelihood per token, in [0, 1]."""
    scores = []
    for batch in rows.candidates():
        logits = _logits(model, batch)[:, :-1]
        targets = batch["labels"][:, 1:]
        losses = nn.functional.cross_entropy(logits.mT, targets, ignore_index=-100, reduction="none")
        scores.append(-losses.sum(1) / (targets != -100).sum(1))
    chosen = torch.cat(scores).view(len(rows), -1).argmax(1)
    return float((chosen.cpu() == torch.tensor(rows.labels)).float().mean())


def is_causal(name: str) -> bool:
    """Return whether the configuration of a model, from a folder or hub id, names a causal language model.

    Raises:
        OptionError: the configuration cannot be read.
    """
    from transformers import AutoConfig

    with loading(name):
        config = AutoConfig.from_pretrained(name)
    kinds = getattr(config, "architectures", None) or ()
    return any("ForCausalLM" in kind or "LMHead" in kind for kind in kinds)


def load_model(name: str, device: torch.device) -> tuple[Any, Any]:
    """Return a causal language model and its tokenizer. On a CPU the weights are float32, on CUDA as they are stored.

    Raises:
        OptionError: the model cannot be loaded.
    """
    from transformers import AutoTokenizer

    with loading(name):
        tokenizer, model = AutoTokenizer.from_pretrained(name), load_causal(name)
    return (model.float() if device.type == "cpu" else model).to(device).eval(), tokenizer


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return float32 logits [b, t, vocabulary]."""
    found: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    return found.float()
