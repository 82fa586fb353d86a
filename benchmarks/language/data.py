"""Tasks and source text as tokens. A class is chosen by the likelihood of its words after the text."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradguide.demo.data import Task, few_shot, read_file

__all__ = [
    "WINDOW", "Batch", "Choices", "Pair", "Rows", "Target", "Texts", "Tokens", "answer_batches", "padded",
    "with_labels",
]  # fmt: skip

WINDOW = 96
"""Tokens of a window of source text."""
MAX_CLASSES = 10
_POOL = 64
_TEXT_TOKENS = 48
_PROMPT_TOKENS = 80
_ANSWER_TOKENS = 96
_WIDTH, _ANSWER = 16, 4  # rows and answers are padded to multiples of these, so that few shapes occur
_DOMAIN = "clinc_"  # a domain of clinc150 is a task: clinc_travel

Tokens: TypeAlias = list[int]


class Pair(NamedTuple):
    """A prompt and what follows it."""

    prompt: Tokens
    answer: Tokens


class Batch(NamedTuple):
    """Prompts with answers, padded on the right. Without padding on the left, causal attention needs no mask.

    ids: int64 [rows, width].
    positions: int64 [rows, K], the positions whose predictions are the answer's tokens; 0 where unused.
    targets: int64 [rows, K], the answer's tokens; -100 where unused.
    """

    ids: Tensor
    positions: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> Batch:
        """Return the batch on ``device``."""
        return Batch(*(part.to(device, non_blocking=True) for part in self))


def padded(pairs: Sequence[Pair], width: int | None = None, answer: int | None = None) -> Batch:
    """Return the pairs as a batch.

    Args:
        width: length of a row; None for that of the longest pair.
        answer: K, at least the length of the longest answer; None for that length.
    """
    width = width or max(len(pair.prompt) + len(pair.answer) for pair in pairs)
    answer = answer or max(len(pair.answer) for pair in pairs)
    ids = torch.zeros(len(pairs), width, dtype=torch.long)
    positions = torch.zeros(len(pairs), answer, dtype=torch.long)
    targets = torch.full((len(pairs), answer), -100)
    for row, (prompt, words) in enumerate(pairs):
        ids[row, : len(prompt) + len(words)] = torch.tensor(prompt + words)
        positions[row, : len(words)] = torch.arange(len(words)) + len(prompt) - 1
        targets[row, : len(words)] = torch.tensor(words)
    return Batch(ids, positions, targets)


class Choices(NamedTuple):
    """Prompts, each followed by the words of every label. A label's tokens attend to the prompt and to themselves.

    ids: int64 [rows, width].
    segments: int64 [rows, width]: 0 for the prompt, k for the words of label k - 1, -1 for padding.
    positions: int64 [rows, T], the positions whose predictions are the T tokens of all labels.
    """

    ids: Tensor
    segments: Tensor
    positions: Tensor


def with_labels(prompts: Sequence[Tokens], labels: Sequence[Tokens], width: int | None = None) -> Choices:
    """Return each prompt with all labels after it.

    Args:
        width: length of a row; None for that of the longest.
    """
    words = torch.tensor([token for label in labels for token in label])
    segments = torch.tensor([k for k, label in enumerate(labels, 1) for _ in label])
    # A label's first token is predicted at the prompt's end, each other token one position before its own.
    before = torch.arange(len(words)) - 1
    starts = torch.tensor([i == 0 for label in labels for i in range(len(label))])
    width = width or max(map(len, prompts)) + len(words)
    choices = Choices(
        ids=torch.zeros(len(prompts), width, dtype=torch.long),
        segments=torch.full((len(prompts), width), -1),
        positions=torch.zeros(len(prompts), len(words), dtype=torch.long),
    )
    for row, prompt in enumerate(prompts):
        length = len(prompt)
        choices.ids[row, :length] = torch.tensor(prompt)
        choices.segments[row, :length] = 0
        choices.ids[row, length : length + len(words)] = words
        choices.segments[row, length : length + len(words)] = segments
        choices.positions[row] = torch.where(starts, length - 1, length + before)
    return choices


def answer_batches(pairs: Sequence[Pair], size: int, device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Yield pairs as batches of ``size`` rows for ``sampled_loss``: labels are drawn where the answers are."""
    for first in range(0, len(pairs), size):
        chosen = pairs[first : first + size]
        ids = padded(chosen).ids
        column = torch.arange(ids.shape[1])
        lengths = torch.tensor([[len(pair.prompt), len(pair.prompt) + len(pair.answer)] for pair in chosen])
        inside = column < lengths[:, 1:]
        labels = torch.where(inside & (column >= lengths[:, :1]), ids, -100)
        batch = {"input_ids": ids, "attention_mask": inside.long(), "labels": labels}
        yield {name: value.to(device) for name, value in batch.items()}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Training rows.

    Args:
        pairs: the rows.
        width, answer: lengths to which rows and answers can be padded, so that all batches have one shape.
    """

    pairs: list[Pair]
    width: int
    answer: int

    @staticmethod
    def of(pairs: list[Pair], others: Sequence[Pair] = ()) -> Rows:
        """Return rows whose lengths suffice for ``others`` too."""
        all_pairs = [*pairs, *others]
        longest = max(len(pair.prompt) + len(pair.answer) for pair in all_pairs)
        answer = max(len(pair.answer) for pair in all_pairs)
        return Rows(pairs=pairs, width=-(-longest // _WIDTH) * _WIDTH, answer=-(-answer // _ANSWER) * _ANSWER)

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """Return the rows of all parts."""
        return Rows(
            pairs=[pair for part in parts for pair in part.pairs],
            width=max(part.width for part in parts),
            answer=max(part.answer for part in parts),
        )


@dataclass(frozen=True, kw_only=True)
class Target:
    """A few-shot classification task.

    Args:
        labels: the tokens of each class.
        train: the prompt and class of each training row.
        test: the prompt and class of the test rows, in an order that is the same for all seeds.
        pool: the prompt and class of at most 64 random training rows, the same for all seeds: they stand for all.
    """

    labels: list[Tokens]
    train: list[tuple[Tokens, int]]
    test: list[tuple[Tokens, int]]
    pool: list[tuple[Tokens, int]]

    @property
    def width(self) -> int:
        """Length to which every row of the task, with one label, can be padded."""
        return self._width(max(map(len, self.labels)))

    @property
    def choices_width(self) -> int:
        """Length to which every row of the task, with all labels, can be padded."""
        return self._width(sum(map(len, self.labels)))

    def _width(self, words: int) -> int:
        longest = max(len(prompt) for prompt, _ in (*self.train, *self.test, *self.pool)) + words
        return -(-longest // _WIDTH) * _WIDTH

    def pair(self, row: int) -> Pair:
        """Return training row ``row`` with its own label."""
        prompt, label = self.train[row]
        return Pair(prompt, self.labels[label])

    @property
    def rows(self) -> Rows:
        """The training rows with their labels."""
        return self._rows(self.train)

    @property
    def pool_rows(self) -> Rows:
        """The rows of the pool with their labels, in the shape of ``rows``."""
        return self._rows(self.pool)

    def _rows(self, rows: list[tuple[Tokens, int]]) -> Rows:
        pairs = [Pair(prompt, self.labels[label]) for prompt, label in rows]
        return Rows(pairs=pairs, width=self.width, answer=-(-max(map(len, self.labels)) // _ANSWER) * _ANSWER)


class Texts:
    """The data folder, read with a tokenizer.

    Args:
        folder: folder of the text sets; ``wikitext2`` and ``seed_tasks`` hold the source text.
        tokenizer: a Hugging Face tokenizer.
    """

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self._folder = folder
        self._tokenizer = tokenizer

    def target(self, name: str, shots: int, seed: int) -> Target:
        """Return the task ``name`` with ``shots`` training rows per class.

        The classes (at most 10) and the order of the test rows do not depend on ``seed``. ``clinc_travel`` is the
        domain "travel" of clinc150.
        """
        domain = name.removeprefix(_DOMAIN) if name.startswith(_DOMAIN) else None
        folder = self._folder / (name if domain is None else "clinc150")
        train, test = (
            [row for row in read_file(folder / f"{split}.tsv") if domain in (None, row.domain)]
            for split in ("train", "test")
        )
        labels = sorted({example.label for example in train})
        if len(labels) > MAX_CLASSES:
            labels = sorted(random.Random(0).sample(labels, MAX_CLASSES))
        kept = [tuple(e for e in rows if e.label in labels) for rows in (train, test)]
        task = Task(name=name, labels=tuple(labels), train=kept[0], test=kept[1])
        ending = self._encode("\nLabel:")
        rows = [
            [(self._encode(e.text)[:_TEXT_TOKENS] + ending, labels.index(e.label)) for e in examples]
            for examples in (
                few_shot(task, shots, seed),
                random.Random(1).sample(task.test, len(task.test)),
                random.Random(2).sample(task.train, min(_POOL, len(task.train))),
            )
        ]
        words = [self._encode(" " + label.replace("_", " ")) for label in labels]
        return Target(labels=words, train=rows[0], test=rows[1], pool=rows[2])

    def windows(self, split: str, count: int) -> Tensor:
        """Return at most ``count`` windows of encyclopedia: int64 [windows, 96]. ``split`` is "capture" or "eval"."""
        lines = (self._folder / "wikitext2" / f"{split}.txt").read_text(encoding="utf-8").splitlines()
        long = "\n".join(line.strip() for line in lines if len(line) > 200)
        tokens = self._encode(long[: count * WINDOW * 6])  # a token has fewer than 6 characters on average
        count = min(count, len(tokens) // WINDOW)
        return torch.tensor(tokens[: count * WINDOW]).view(count, WINDOW)

    def answers(self, split: str, count: int) -> list[Pair]:
        """Return at most ``count`` instructions with their answers. ``split`` is "capture" or "eval"."""
        lines = (self._folder / "seed_tasks" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        found = []
        for row in map(json.loads, lines):
            text = row["instruction"] + ("\n" + row["input"] if row["input"] else "")
            prompt, answer = self._instruction(text), self._encode(row["output"])
            if len(prompt) <= _PROMPT_TOKENS and len(answer) >= 4:
                found.append(Pair(prompt, answer[:_ANSWER_TOKENS]))
        return found[:count]

    def instructions(self, count: int) -> Rows:
        """Return at most ``count`` answered instructions to learn from. Those of "eval" have the same shape."""
        pairs = self.answers("capture", count)
        return Rows.of(pairs, self.answers("eval", len(pairs)))

    def _encode(self, text: str) -> Tokens:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _instruction(self, text: str) -> Tokens:
        if self._tokenizer.chat_template is None:
            return self._encode(text + "\n")
        messages = [{"role": "user", "content": text}]
        found = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return list(found["input_ids"])
