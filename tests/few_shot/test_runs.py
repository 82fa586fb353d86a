"""Every scenario, from a run to its row, on a tiny encoder."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from benchmarks.few_shot import runs
from benchmarks.few_shot.data import CONDITIONS
from benchmarks.few_shot.encoder import Encoder
from benchmarks.few_shot.grid import SEQUENCES, Run
from benchmarks.few_shot.results import append, done
from benchmarks.few_shot.runs import Settings, Suite
from tests.contract import kit


def run_of(**fields: object) -> Run:
    given = {
        "scenario": "transfer", "source": "assistant", "target": "clinc150", "condition": "clean", "shots": 2,
        "method": "clip", "lr": 1e-3, "seed": 0,
    }  # fmt: skip
    return Run(**{**given, **fields})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def suite(sets: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """A suite whose runs are short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "STEPS", 10)
        yield Suite(Settings(data=sets, cache=tmp_path_factory.mktemp("cache"), model=str(tiny_model)))


RUNS = [
    run_of(),
    run_of(method="GradGuide", seed=5),
    run_of(target="banking77", method="A-GEM"),
    run_of(scenario="cross", source="films", target="goemotions", method="EWC"),
    run_of(scenario="digits", source="digits 0-4", target="digits 5-9", method="GradGuide"),
    *(run_of(scenario="rough", condition=condition, method="GradGuide") for condition in CONDITIONS),
]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.scenario}-{run.condition}-{run.method}")
def test_a_run_gives_a_row_that_the_file_takes_and_remembers(suite: Suite, tmp_path: Path, run: Run) -> None:
    row = suite.row(run)
    assert 0.0 <= row["target_accuracy"] <= 1.0
    assert 0.0 <= row["source_accuracy"] <= 1.0
    assert 0.0 < row["coherence"] <= 1.0
    assert math.isfinite(row["alignment"]) == (run.seed < 2)
    assert row["seconds"] > 0
    path = tmp_path / "results.csv"
    about = dict.fromkeys(("model", "commit", "gradguide", "torch", "python", "device", "threads"), "x")
    append(path, run, row, about)
    append(path, run_of(seed=7), row, about)
    assert done(path, "x") == {run, run_of(seed=7)}


def test_the_same_run_twice_is_the_same(suite: Suite) -> None:
    run = run_of(method="GradGuide", lr=1e-2)
    first = suite.row(run)
    suite.row(run_of(method="replay", target="banking77"))
    second = suite.row(run)
    for key in ("target_accuracy", "source_accuracy", "loss", "coherence", "alignment"):
        assert first[key] == second[key], key


@pytest.mark.parametrize("method", ["clip", "EWC", "A-GEM", "GradGuide"])
def test_a_sequence_learns_five_tasks_and_says_what_was_lost(
    suite: Suite, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SEQUENCES, "small", ("clinc150", "banking77", "mr", "clinc150", "banking77"))
    row = suite.row(run_of(scenario="sequence", source="none", target="small", method=method))
    assert -1.0 <= row["backward_transfer"] <= 1.0
    assert 0.0 <= row["target_accuracy"] <= 1.0
    assert (row["capture_seconds"] > 0.01) == (method in ("EWC", "GradGuide"))


def test_another_model_of_the_same_shape_has_its_own_source(sets: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: value + 1 for name, value in weights.items()}, other / "model.safetensors", {"format": "pt"})
    cache = tmp_path / "cache"
    for model in (tiny_model, other, other):
        Encoder(str(model), sets, "assistant", cache)
    assert len(list(cache.glob("assistant-*/trained.safetensors"))) == 2


def test_a_source_from_the_cache_is_the_one_that_was_trained(sets: Path, tiny_model: Path, tmp_path: Path) -> None:
    trained, cached = (Encoder(str(tiny_model), sets, "assistant", tmp_path) for _ in range(2))
    assert len(list(tmp_path.glob("assistant-*/trained.safetensors"))) == 1
    kit.assert_same(cached.model.state_dict(), trained.model.state_dict())
    free = [[name for name, p in each.model.named_parameters() if p.requires_grad] for each in (trained, cached)]
    assert free[0] == free[1]
    (first,), (second,) = trained.earlier.sources, cached.earlier.sources
    names = list(first.names())
    values = [trained.model.get_parameter(name).detach() for name in names]
    rows = [source.row(names, values) for source in (first, second)]
    kit.assert_same([rows[1].offset, rows[1].scale], [rows[0].offset, rows[0].scale])
