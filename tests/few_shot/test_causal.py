"""The causal language model path: labels by their likelihood."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.demo import batches
from benchmarks.few_shot.causal import Causal
from benchmarks.few_shot.data import episode
from benchmarks.few_shot.methods import METHODS
from benchmarks.few_shot.train import train


@pytest.fixture(scope="module")
def causal(sets: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Causal:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("causal")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.save_pretrained(str(folder))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(str(folder))
    return Causal(str(folder), sets)


def test_the_loss_is_the_likelihood_of_the_label_alone(causal: Causal, sets: Path) -> None:
    few = episode(sets, "mr", 2, 0)
    rows = causal.score(few.train, few.task.labels)
    causal.model.eval()
    expected = []
    for prompt, answer in zip(rows.prompts, rows.answers, strict=True):
        label = rows.labels[answer]
        logits = causal.model(input_ids=torch.tensor([[*prompt, *label]])).logits[0].log_softmax(dim=-1)
        expected.append(-sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(label)))
    found = causal.loss(rows, range(len(rows.prompts)))
    torch.testing.assert_close(found, torch.stack(expected).mean(), rtol=1e-4, atol=1e-5)


def test_a_problem_trains_and_is_evaluated(causal: Causal, sets: Path) -> None:
    problem = causal.problem(episode(sets, "mr", 2, 0), 0)
    before = float(problem.loss(range(problem.rows)).detach())
    trained = train(problem, METHODS["GradGuide"], 1e-2, batches(problem.rows, 4, 0), 30, seed=0, detailed=True)
    assert trained.loss < before
    assert set(trained.accuracies) == {"target", "source"}
