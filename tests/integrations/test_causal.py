"""Load causal language models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from gradguide.integrations.causal import load_causal
from tests.sources.structured.problems import llama


def test_the_stored_dtype_is_kept(tmp_path: Path) -> None:
    llama(1).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_causal(str(tmp_path)).dtype == torch.bfloat16


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"has no weights for .* parameters"):
        load_causal(str(tmp_path))
