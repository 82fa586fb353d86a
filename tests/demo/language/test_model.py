"""Rows, likelihoods of a causal language model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from gradguide.demo.config import OptionError
from gradguide.demo.data import Example
from gradguide.demo.language.model import Rows, accuracy, encode, is_causal, load_model

CPU = torch.device("cpu")


@pytest.fixture
def rows(folder: Path) -> Rows:
    _, tokenizer = load_model(str(folder), CPU)
    examples = [Example("white cold flake", "snow_wolf", None), Example("dry", "sand", None)]
    return encode(examples, ("sand", "snow_wolf"), tokenizer, CPU)


def test_only_the_answer_is_predicted(rows: Rows) -> None:
    batch = rows.batch([0, 1])
    for row in range(2):
        label = rows.labels[row]
        assert batch["labels"][row][batch["labels"][row] != -100].tolist() == rows.answers[label]
        length = len(rows.prompts[row]) + len(rows.answers[label])
        assert batch["attention_mask"][row].sum() == length
        assert batch["input_ids"][row, :length].tolist() == rows.prompts[row] + rows.answers[label]


def test_prompts_begin_as_the_tokenizer_begins_a_text(folder: Path, rows: Rows) -> None:
    """Llama and Gemma are trained on texts after BOS; Gemma without it predicts next to nothing."""
    _, tokenizer = load_model(str(folder), CPU)
    bos = tokenizer.bos_token or "<s>"
    tokenizer.add_special_tokens({"bos_token": bos})
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    found = encode([Example("white cold flake", "snow_wolf", None)], ("sand", "snow_wolf"), tokenizer, CPU)
    assert found.prompts[0] == [tokenizer.bos_token_id, *rows.prompts[0]]
    assert found.answers == rows.answers


@torch.no_grad()
def test_accuracy_chooses_the_likeliest_label(folder: Path, rows: Rows) -> None:
    model, _ = load_model(str(folder), CPU)
    right = 0
    for row, prompt in enumerate(rows.prompts):
        scores = []
        for answer in rows.answers:
            ids = torch.tensor([prompt + answer])
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
            found = sum(float(logs[place, token]) for place, token in zip(places, answer, strict=True))
            scores.append(found / len(answer))
        right += scores.index(max(scores)) == rows.labels[row]
    assert accuracy(model, rows) == right / len(rows)


def test_models_are_told_apart_and_unreadable_ones_refused(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    assert is_causal(str(folder))
    assert not is_causal(str(tiny_model))
    for work in (lambda: is_causal(str(tmp_path)), lambda: load_model(str(tmp_path), CPU)):
        with pytest.raises(OptionError, match="--model cannot be loaded"):
            work()
