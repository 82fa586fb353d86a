"""A tiny random language model, and tiny sets under the names of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.language.grid import CHOOSING, CONFIRMING
from tests.demo.conftest import WORDS, tiny_model, write_tsv

__all__ = ["folder", "sets", "tiny_model"]

_TEXTS = {label: words for labels in WORDS.values() for label, words in labels.items()}


@pytest.fixture(scope="session")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sets of six classes (clinc150: in each of four domains), encyclopedia and answered instructions."""
    root = tmp_path_factory.mktemp("sets")
    names = {name for name in (*CHOOSING, *CONFIRMING) if not name.startswith("clinc_")} | {"clinc150"}
    for name in names:
        (root / name).mkdir()
        domains = ("travel", "work", "home", "utility") if name == "clinc150" else ("",)
        for split, count in (("train", 18), ("test", 4)):
            rows = [
                (" ".join([words, *["the"] * (number % 3), *["a"] * number]), label, domain)
                for domain in domains
                for label, words in _TEXTS.items()
                for number in range(count)
            ]
            if name == "clinc150":
                write_tsv(root / name / f"{split}.tsv", rows)
            else:
                write_tsv(root / name / f"{split}.tsv", [row[:2] for row in rows], header=("text", "label"))
    (root / "wikitext2").mkdir()
    (root / "seed_tasks").mkdir()
    line = " ".join(_TEXTS.values())
    for split in ("capture", "eval"):
        lines = [" ".join([line] * 3 + [word] * 5) for word in line.split() for _ in range(3)]
        (root / "wikitext2" / f"{split}.txt").write_text("\n".join(lines), encoding="utf-8")
        answers = [{"instruction": f"the {t}", "input": "", "output": f"{w} a the"} for t, w in _TEXTS.items()]
        (root / "seed_tasks" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, answers)), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of one layer and the vocabulary of the words above."""
    transformers = pytest.importorskip("transformers")
    made = tmp_path_factory.mktemp("language")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny_model))
    tokenizer.save_pretrained(str(made))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
        transformers.LlamaForCausalLM(config).save_pretrained(str(made))
    return made
