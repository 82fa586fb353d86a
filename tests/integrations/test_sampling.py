"""Source text that a model writes itself is sampled from its own predictions, with any cache, and disturbs nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from gradguide.integrations.transformers import own_text
from tests.integrations.lora import QUIET
from tests.sources.structured.problems import VOCABULARY, adapted, gpt2, llama

pytestmark = QUIET


class Words:
    """A tokenizer of ``VOCABULARY`` tokens, of which the first is BOS."""

    bos_token_id: int | None = 0
    all_special_ids = (0, 1)

    def __len__(self) -> int:
        return VOCABULARY


class Uncached(nn.Module):
    """A language model without a cache, whose next token is the last one plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool = False, past_key_values: None = None) -> SimpleNamespace:
        following = nn.functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY)
        return SimpleNamespace(logits=100.0 * following)


@pytest.mark.parametrize("make", [llama, gpt2, lambda: adapted(llama(1))])
def test_text_follows_the_predictions(make: type[nn.Module]) -> None:
    """Tokens have the likelihood of the model: far above that of random tokens, and equal to its own entropy."""
    model = make()
    model.train()
    state = torch.get_rng_state()
    batches = own_text(model, Words(), tokens=4000, length=40, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (100, 40)
    assert bool((ids[:, 0] == 0).all())
    assert len(set(ids[:, 1].tolist()) - {0, 1}) > 30
    model.eval()
    with torch.no_grad():
        logs = model(input_ids=ids).logits[:, 1:-1].log_softmax(-1)
    found = float(-logs.gather(-1, ids[:, 2:, None]).mean())
    assert found == pytest.approx(float(-(logs.exp() * logs).sum(-1).mean()), rel=0.03)
    again = own_text(model, Words(), tokens=4000, length=40, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    other = own_text(model, Words(), tokens=4000, length=40, seed=4)
    assert not torch.equal(other[0]["input_ids"], again[0]["input_ids"])


def test_a_model_without_a_cache_reads_all_tokens_again() -> None:
    (batch,) = own_text(Uncached(), Words(), tokens=60, length=20)
    ids = batch["input_ids"]
    assert torch.equal(ids[:, 2:], (ids[:, 1:-1] + 1) % VOCABULARY)
    assert torch.equal(batch["attention_mask"], torch.ones_like(ids))


def test_fewer_tokens_than_a_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be at least length=20, found 19"):
        own_text(Uncached(), Words(), tokens=19, length=20)
