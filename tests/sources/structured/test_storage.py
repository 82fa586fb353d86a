"""Save and load structured sources."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from gradguide import SourceGradient
from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from gradguide.sources.structured.factors import Factor, LayerFactors
from tests.sources.structured.problems import adapted, llama, spread, text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_same_source(tmp_path: Path, dtype: torch.dtype) -> None:
    model = adapted(llama(1))
    spread(model, 0.1)
    source = StructuredSource.capture(model, text(2), sampled_loss, rank=4, dtype=dtype)
    source.save(tmp_path / "source.safetensors")
    loaded = StructuredSource.load(tmp_path / "source.safetensors")
    assert loaded.names() == source.names()
    assert loaded.metadata == source.metadata
    assert loaded.fingerprint() == source.fingerprint()


def test_a_file_with_factors_of_tokens_alone_is_of_an_earlier_version(tmp_path: Path) -> None:
    path = tmp_path / "source.safetensors"
    StructuredSource.capture(llama(1), text(2), sampled_loss, rank=4).save(path)
    with safe_open(path, "pt") as file:
        parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        header = file.metadata()
    save_file({k: t[0].clone() if k[:2] in ("s_", "g_") else t for k, t in parts.items()}, path, header)
    with pytest.raises(ValueError, match=r"older layout.*capture it again"):
        StructuredSource.load(path)


def test_the_fingerprint_tells_every_part_apart() -> None:
    """Ranks compare it, so that all pull to the same."""
    factor, other = (Factor(torch.full((1, 2, 2), value), torch.ones(1, 2)) for value in (1.0, 2.0))
    longer = Factor(factor.basis, torch.full((1, 2), 2.0))
    turned = Factor(torch.ones(1, 2, 1), torch.ones(1, 2))
    anchor, sample = (torch.ones(2, 1), torch.ones(1, 2)), torch.ones(4)
    held = LayerFactors(factor, factor, 1.0, anchor, sample)
    changes: list[dict[str, Any]] = [
        {part: each} for part in ("inputs", "outputs") for each in (other, longer, turned, factor.to(dtype=torch.half))
    ]
    changes += [{"anchor": None}, {"anchor": (2 * anchor[0], anchor[1])}, {"anchor": (anchor[0], 2 * anchor[1])}]
    changes += [{"weight": None}, {"weight": 2 * sample}, {"scale": 2.0}, {}]
    sources = [StructuredSource({"layer": replace(held, **change)}) for change in changes]
    sources += [StructuredSource(dict.fromkeys(names, held)) for names in (["other"], ["layer", "other"])]
    found = [source.fingerprint() for source in sources]
    sources[0].floor = 0.5
    assert len({*found, sources[0].fingerprint()}) == len(found) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_dtype_keeps_the_floor(dtype: torch.dtype) -> None:
    source = StructuredSource.capture(llama(1), text(2), sampled_loss, rank=4)
    source.floor = 0.5
    assert source.to_dtype(dtype).floor == 0.5


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    SourceGradient({"w": torch.ones(3)}).save(tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="holds no structured source"):
        StructuredSource.load(tmp_path / "plain.safetensors")
    source = StructuredSource.capture(llama(1), text(1), sampled_loss, rank=4)
    source.save(tmp_path / "source.safetensors")
    with pytest.raises(ValueError, match=r"holds a structured source; read it with StructuredSource.load"):
        SourceGradient.load(tmp_path / "source.safetensors")


def test_a_scale_beyond_any_float_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "source.safetensors"
    StructuredSource.capture(llama(1), text(1), sampled_loss, rank=4).save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["gradguide"])
        header["layers"][0][1] = 10**400
        save_file({key: file.get_tensor(key) for key in file.keys()}, path, {"gradguide": json.dumps(header)})  # noqa: SIM118
    with pytest.raises(ValueError, match="is damaged"):
        StructuredSource.load(path)
