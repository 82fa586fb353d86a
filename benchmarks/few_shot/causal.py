"""Problems on a causal language model with a LoRA adapter, which classifies by the likelihood of each label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo import Example, add_lora, batches, draw
from benchmarks.few_shot.data import Episode, Problem, source_task
from gradguide import SourceGradient
from gradguide.integrations.peft import lora_parameters

__all__ = ["Causal", "Scored"]

_SOURCE = "assistant"
_SOURCE_LABELS = 15
_SOURCE_ROWS_PER_LABEL = 16
_SOURCE_TEST_PER_LABEL = 4
_SOURCE_STEPS = 80
_SOURCE_LR = 1e-3
_MAX_TOKENS = 96
_BATCH = 8
_IGNORED = -100


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Rows and labels as tokens: row i has the prompt ``prompts[i]`` and the label ``labels[answers[i]]``."""

    prompts: list[list[int]]
    answers: list[int]
    labels: list[list[int]]


class Causal:
    """A model trained on a source task, and few-shot problems that start from it. It has no head.

    Args:
        name: hub id or folder of a causal language model; only safetensors files are loaded.
        data: folder of the text sets.
    """

    def __init__(self, name: str, data: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._tokenizer: Any = AutoTokenizer.from_pretrained(name)
        base: Any = AutoModelForCausalLM.from_pretrained(name, use_safetensors=True)
        self.model = add_lora(base.to(self.device))
        task = source_task(data, _SOURCE)
        labels = task.labels[:_SOURCE_LABELS]
        train, test = ([e for e in rows if e.label in labels] for rows in (task.train, task.test))
        self._source_rows = self.score(draw(train, _SOURCE_ROWS_PER_LABEL, 0), labels)
        self._source_test = self.score(draw(test, _SOURCE_TEST_PER_LABEL, 0), labels)
        self._train()
        self._start = {n: p.detach().clone() for n, p in lora_parameters(self.model)}
        self._source = self._capture()
        self.source_accuracy = self.accuracy(self._source_test)

    def score(self, rows: Sequence[Example], labels: Sequence[str]) -> Scored:
        """Return ``rows`` as tokens: each text with a question, and each label with spaces for underscores."""

        def tokens(text: str) -> list[int]:
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

        start = [] if self._tokenizer.bos_token_id is None else [int(self._tokenizer.bos_token_id)]
        question = tokens("\nLabel:")
        return Scored(
            prompts=[[*start, *tokens(e.text)[:_MAX_TOKENS], *question] for e in rows],
            answers=[list(labels).index(e.label) for e in rows],
            labels=[tokens(" " + label.replace("_", " ")) for label in labels],
        )

    def loss(self, rows: Scored, chosen: Sequence[int]) -> Tensor:
        """Return the mean negative log-likelihood of the right labels of the chosen rows, in nats per label."""
        return -self._likelihood([(rows.prompts[i], rows.labels[rows.answers[i]]) for i in chosen]).mean()

    def accuracy(self, rows: Scored) -> float:
        """Return the share of rows whose right label has the highest likelihood per token, in [0, 1].

        The model's mode is unchanged afterwards.
        """
        training = self.model.training
        self.model.eval()
        right = 0
        with torch.inference_mode():
            for prompt, answer in zip(rows.prompts, rows.answers, strict=True):
                pairs = [(prompt, label) for label in rows.labels]
                lengths = torch.tensor([len(label) for label in rows.labels], device=self.device)
                right += int((self._likelihood(pairs) / lengths).argmax()) == answer
        self.model.train(training)
        return right / len(rows.prompts)

    def problem(self, episode: Episode, seed: int) -> Problem:
        """Return the episode as a problem that starts from the source adapter."""
        with torch.no_grad():
            for name, parameter in lora_parameters(self.model):
                parameter.copy_(self._start[name])
                parameter.grad = None
        self.model.train()
        labels = episode.task.labels
        train, pool, probe, test = (
            self.score(rows, labels) for rows in (episode.train, episode.pool, episode.probe, episode.task.test)
        )
        live: Iterator[list[int]] = batches(len(self._source_rows.prompts), _BATCH, seed)

        def pool_loss() -> Iterable[tuple[int, Tensor]]:
            for start in range(0, len(pool.prompts), _BATCH):
                chosen = range(start, min(start + _BATCH, len(pool.prompts)))
                yield len(chosen), self.loss(pool, chosen)

        return Problem(
            adapter=lora_parameters(self.model),
            head=[],
            rows=len(train.prompts),
            classes=len(labels),
            loss=lambda chosen: self.loss(train, chosen),
            source_loss=[lambda: self.loss(self._source_rows, next(live))],
            sources=(self._source,),
            pool_loss=pool_loss,
            accuracy=lambda: {"target": self.accuracy(test), "source": self.accuracy(self._source_test)},
            probe=lambda: self.accuracy(probe),
        )

    def _likelihood(self, pairs: Sequence[tuple[list[int], list[int]]]) -> Tensor:
        """Return the log-likelihood in nats of each label after its prompt, [b]."""
        longest = max(len(prompt) + len(label) for prompt, label in pairs)
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        mask, targets = torch.zeros_like(ids), torch.full_like(ids, _IGNORED)
        for i, (prompt, label) in enumerate(pairs):
            whole = torch.tensor([*prompt, *label])
            ids[i, : len(whole)] = whole
            mask[i, : len(whole)] = 1
            targets[i, len(prompt) : len(whole)] = whole[len(prompt) :]
        ids, mask, targets = ids.to(self.device), mask.to(self.device), targets.to(self.device)
        logits = self.model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        each = nn.functional.cross_entropy(
            logits.transpose(1, 2), targets[:, 1:], ignore_index=_IGNORED, reduction="none"
        )
        return -each.sum(dim=1)

    def _train(self) -> None:
        optimizer = torch.optim.AdamW([p for _, p in lora_parameters(self.model)], lr=_SOURCE_LR)
        stream = batches(len(self._source_rows.prompts), 2 * _BATCH, 0)
        self.model.train()
        for _ in range(_SOURCE_STEPS):
            optimizer.zero_grad()
            self.loss(self._source_rows, next(stream)).backward()
            nn.utils.clip_grad_norm_([p for _, p in lora_parameters(self.model)], 1.0)
            optimizer.step()

    def _capture(self) -> SourceGradient:
        """Return the source with the empirical Fisher information, since labels of several tokens cannot be drawn."""
        rows = self._source_rows
        chunks = torch.arange(len(rows.prompts)).split(4)
        return SourceGradient.capture(self.model, list(chunks), lambda _, chosen: self.loss(rows, chosen.tolist()))
