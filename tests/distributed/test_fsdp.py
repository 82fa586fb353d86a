"""Compare FSDP2 on two gloo ranks with one process (rows 8, 11, 16, 17)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gradguide import SourceGradient
from tests.distributed import problem
from tests.distributed.launch import ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("fsdp")
    ranks("fsdp_rank.py", made)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", problem.KINDS)
def test_i11_two_ranks_equal_one_process(found: list[dict[str, Any]], kind: str) -> None:
    wanted = problem.alone(kind)
    for rank in found:
        for part in ("parameters", "directions"):
            assert rank[kind][part].keys() == wanted[part].keys()
            for name, value in wanted[part].items():
                problem.close(rank[kind][part][name], value, kind, name)
    for step, (ours, theirs) in enumerate(zip(found[0][kind]["metrics"], wanted["metrics"], strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-2, abs=2e-4, nan_ok=True), step


@pytest.mark.parametrize("kind", problem.KINDS)
def test_i16_ranks_stay_bitwise_together(found: list[dict[str, Any]], kind: str) -> None:
    for name, value in found[0][kind]["parameters"].items():
        assert torch.equal(value, found[1][kind]["parameters"][name]), name


@pytest.mark.parametrize("kind", problem.KINDS)
def test_i17_one_all_reduce_of_a_few_numbers_per_measuring(found: list[dict[str, Any]], kind: str) -> None:
    scopes = {"module": 4, "tensor": 7}.get(kind, 1)
    sources = {"gradient": 1, "update": 1, "two sources": 2, "regularizer": 1}.get(kind, 0)
    step = [scopes * (2 + sources) ** 2]
    if kind == "regularizer":  # its own source and the parameters, then its gradient as one more row
        step = [(2 + 1 + 1) ** 2, (2 + sources + 1) ** 2]
    if kind not in ("gradient", "shared"):  # a rule acts on the update: one more all-reduce
        step.append(scopes * (2 + (sources if kind != "gradient" else 0)) ** 2)
    for rank in found:
        # Before the first step, one to compare options.
        assert rank[kind]["all_reduces"] == [2, *step * problem.STEPS]


@pytest.mark.parametrize("kind", ["", "-divided"], ids=["averaged", "summed"])
def test_i16_a_source_captured_on_shards_is_that_of_one_process_on_every_rank(folder: Path, kind: str) -> None:
    """FSDP2 divides gradients by the number of ranks, unless ``set_gradient_divide_factor`` says otherwise."""
    if not (folder / f"captured0{kind}.safetensors").exists():
        pytest.skip("this torch cannot divide by another number on a CPU")
    model = problem.net()
    batches = [problem.batch(step) for step in range(3)]
    with pytest.warns(UserWarning, match=r"reached 2 of the 7 .*unused\.weight"):
        wanted = SourceGradient.capture(model, batches, lambda m, b: problem.loss_of(m, *b))
    captured = [SourceGradient.load(folder / f"captured{rank}{kind}.safetensors") for rank in range(2)]
    assert captured[0].fingerprint() == captured[1].fingerprint()
    at = list(model.parameters())
    ours, theirs = (source.row(wanted.names(), at) for source in (captured[0], wanted))
    assert captured[0].metadata["examples"] == wanted.metadata["examples"] == 24
    assert captured[0].metadata["loss"] == pytest.approx(wanted.metadata["loss"])
    for part in ("offset", "scale", "anchor"):
        for a, b in zip(getattr(ours, part), getattr(theirs, part), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
