"""The cost benchmarks run and write their results."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import capture, communication, growth, objective, peers, training
from benchmarks.sets import SETS, Set
from gradguide import GradGuide

pytestmark = pytest.mark.slow


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_capture(tmp_path: Path) -> None:
    capture.main(["--quick", "--out", str(tmp_path / "capture.csv")])
    found = {row["provider"]: row for row in rows(tmp_path / "capture.csv")}
    assert float(found["forward and backward alone"]["value"]) == 1.0
    assert {"capture, empirical Fisher", "metrics read"} <= set(found)
    assert all(row["commit"] and row["torch"] for row in found.values())


def test_objective(tmp_path: Path) -> None:
    objective.main(["--quick", "--out", str(tmp_path / "objective.csv")])
    found = {row["provider"]: float(row["value"]) for row in rows(tmp_path / "objective.csv")}
    assert found.keys() == {"no regularizer", "finite differences"}
    assert found["no regularizer"] == 1.0


def test_timed_training_steps_measure_updates_from_the_same_parameters() -> None:
    model = torch.nn.Linear(64, 64)
    trained, x = list(model.parameters()), torch.randn(8, 64)
    start = [p.detach().clone() for p in trained]
    optimizers = training.guided(trained, list(model.named_parameters()))

    def loss() -> torch.Tensor:
        assert all(map(torch.equal, trained, start))
        value: torch.Tensor = model(x).square().mean()
        return value

    rows = training.time_training("small", 2, loss, trained, optimizers)
    assert {row.provider for row in rows} == {"model", *optimizers}
    for name in ("defaults, no source", "defaults, anchored source"):
        guide = optimizers[name]
        assert isinstance(guide, GradGuide)
        assert guide.metrics()["update_norm"] > 0, name


def test_every_peer_reconciles_the_gradients() -> None:
    """In place: the result does not conflict with the source. ZClip does not use the source."""
    small = Set("small", [(8, 4), (16,)])
    found = peers.compare(small, 2, torch.device("cpu"))
    assert {row.provider for row in found} == set(peers.PEERS)
    for name, make in peers.PEERS.items():
        vectors = peers.Vectors(small, torch.device("cpu"))
        vectors.fill()
        make(vectors)()
        cosine = torch.cosine_similarity(peers.flat(vectors.grads), peers.flat(vectors.source), dim=0)
        assert bool(cosine < -1e-5) == name.startswith("ZClip"), name


def test_communication_does_not_grow_with_the_parameters(tmp_path: Path) -> None:
    communication.main(["--out", str(tmp_path / "communication.csv")])
    found = rows(tmp_path / "communication.csv")
    for kind, payload in (("AdamW", "0"), ("no source", "64"), ("one source", "144"), ("anchored source", "104")):
        sent = {row["payload_bytes"] for row in found if row["optimizer"] == kind}
        assert sent == {payload}, kind
    assert {row["ranks"] for row in found} == {"2", "8", "64", "1024"}


def test_growth(tmp_path: Path) -> None:
    """The pull's share falls with the model, and a source of rank 64 takes hardly more than an adapter of that rank."""
    growth.main(["--out", str(tmp_path / "growth.csv")])
    found = [row for row in rows(tmp_path / "growth.csv") if row["provider"] == "defaults, structured source"]
    assert [row["model"] for row in found] == ["0.1B", "1.1B", "8B", "70B"]
    assert int(found[1]["trained"]) == SETS["LoRA r16 of a 1.1B Llama"].elements
    shares = [float(row["pull_share"]) for row in found]
    assert shares == sorted(shares, reverse=True)
    for row in found:
        source = int(row["held"]) - 4 * int(row["trained"])  # beside the pull
        assert int(row["adapter"]) < source < 1.05 * int(row["adapter"])


def test_the_part_of_the_host_is_measured_without_launches() -> None:
    pytest.importorskip("triton")
    from benchmarks import host

    found = host.measure("a few tensors", 3, rounds=2)
    assert {row.provider for row in found} == set(host.PROVIDERS)
    assert all(row.value > 0 for row in found)
