"""The README's example of a structured source runs as it stands, with less text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integrations.lora import QUIET
from tests.integrations.test_sampling import Words
from tests.sources.structured.problems import adapted, llama

pytestmark = QUIET

README = Path(__file__).parents[3] / "README.md"


def test_the_example_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    (example,) = [block for block in blocks if "StructuredSource.capture" in block]
    monkeypatch.chdir(tmp_path)
    model: Any = adapted(llama())
    model.config.max_position_embeddings = 96
    names: dict[str, Any] = {"model": model, "tokenizer": Words(), "torch": torch}
    exec(example.replace("tokens=16384", "tokens=3168"), names)
    assert (tmp_path / "base.safetensors").exists()
    optimizer = names["optimizer"]
    ids = torch.randint(2, 20, (4, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert optimizer.metrics()["source_drift"] > 0
