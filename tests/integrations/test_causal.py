"""Load causal language models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

from gradguide.integrations.causal import check_causal, load_causal
from tests.sources.structured.problems import gpt2, llama

BERT = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)


def test_the_stored_dtype_is_kept(tmp_path: Path) -> None:
    llama(1).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_causal(str(tmp_path)).dtype == torch.bfloat16


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    BertModel(BERT).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for .* parameters"):
        load_causal(str(tmp_path))


def test_a_masked_model_is_refused_although_it_is_loaded(tmp_path: Path) -> None:
    """transformers loads it as a causal model, with attention in both directions."""
    torch.manual_seed(0)
    model = BertForMaskedLM(BERT)
    for p in model.parameters():
        p.data *= 20 if p.dim() > 1 else 1  # random weights are small
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"BertLMHeadModel depend on the tokens that follow.* masked model"):
        check_causal(load_causal(str(tmp_path)))
    for causal in (llama(1), gpt2()):
        check_causal(causal.eval())


def test_a_model_that_is_not_loaded_as_a_causal_one_is_refused_in_one_line(tmp_path: Path) -> None:
    """transformers lists some hundred configurations instead."""
    layers = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(vocab_size=20, **layers)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"AutoModelForCausalLM .*T5Config.*StructuredSource.capture") as caught:
        load_causal(str(tmp_path))
    assert len(str(caught.value)) < 600
    assert "\n" not in str(caught.value)
