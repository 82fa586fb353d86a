"""Capture and train with a structured source on two gloo ranks, as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gradguide.sources.structured import StructuredSource
from tests.distributed.launch import ranks
from tests.sources.structured import gloo_rank
from tests.sources.structured.problems import llama, text

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("structured")
    StructuredSource.capture(llama(), text(4), gloo_rank.drawn, rank=8).save(made / "llama.safetensors")
    gloo_rank.capture_of(gloo_rank.mlp("whole"), gloo_rank.square).save(made / "mlp.safetensors")
    return made


def run(folder: Path, action: str) -> list[dict[str, Any]]:
    ranks(Path(gloo_rank.__file__), folder, 2, action, timeout=300.0)
    return [torch.load(folder / f"{action}-rank{rank}.pt", weights_only=True) for rank in range(2)]


def check(found: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    """Assert that each rank has the result of one process, and that ranks are equal bitwise."""
    assert wanted["metrics"][-1]["source_drift"] > 0
    for rank in found:
        for ours, theirs in zip(rank["metrics"], wanted["metrics"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-2, abs=1e-4, nan_ok=True)
        for name, value in wanted.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(rank[name], value, rtol=2e-4, atol=2e-5, msg=name)
                assert torch.equal(rank[name], found[0][name]), name


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_two_ranks_equal_one_process(folder: Path, wrapper: str) -> None:
    found = run(folder, wrapper)
    for kind in gloo_rank.KINDS:
        model = gloo_rank.language_model(kind)
        check([rank[kind] for rank in found], gloo_rank.train(model, gloo_rank.guide(model, folder, "llama")))


def test_tensor_parallel_layers_equal_one_process_and_are_not_captured(folder: Path) -> None:
    found = run(folder, "tensor parallel")
    for kind in gloo_rank.KINDS:
        model = gloo_rank.mlp(kind)
        check([rank[kind] for rank in found], gloo_rank.train_mlp(model, gloo_rank.guide(model, folder, "mlp")))
        for rank in found:
            assert "capture under tensor parallelism is not supported" in rank[kind]["error"]


def test_a_checkpoint_of_shards_resumes_bitwise(folder: Path) -> None:
    for rank in run(folder, "resume"):
        for kind in gloo_rank.KINDS:
            through, resumed = rank[kind]["through"], rank[kind]["resumed"]
            assert through["metrics"] == resumed["metrics"]
            assert resumed["metrics"][-1]["source_drift"] > 0
            for name, value in through.items():
                assert not isinstance(value, Tensor) or torch.equal(value, resumed[name]), (kind, name)


def test_capture_on_two_ranks_equals_one_process_on_all_batches(folder: Path) -> None:
    errors = run(folder, "capture")
    wanted = StructuredSource.capture(llama(), text(4, rows=2), gloo_rank.drawn, rank=4)
    for kind in ("plain", "ddp", "fsdp", "one rank", "fsdp checkpointed", "fsdp checkpointed, reentrant"):
        found = [StructuredSource.load(folder / f"{kind}-{rank}.safetensors") for rank in range(2)]
        assert found[0].fingerprint() == found[1].fingerprint()
        assert found[0].names() == wanted.names()
        assert found[0].metadata["base"] == wanted.metadata["base"]
        assert found[0].metadata["tokens"] == wanted.metadata["tokens"]
        assert found[0].metadata["loss"] == pytest.approx(wanted.metadata["loss"], rel=1e-5)
        for name in wanted.names():
            for ours, theirs in zip(found[0].factors(name), wanted.factors(name), strict=True):
                assert float((ours - theirs).norm()) <= 1e-3 * float(theirs.norm()), (kind, name)
    for rank in errors:
        assert rank["layers"] == "twin low high"
        assert rank["scales"] == "1.0000 1.0000 1.0000"
        assert "at least one batch, found none" in rank["none"]
        assert "no batch reached 1 of 3 layers (low)" in rank["unreached"]
        assert "is not the weight at capture" in rank["refused"]
    assert errors[0] == errors[1]
