"""Scenarios of several tasks: what each step starts from, and what is reported of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.language.data import Rows
from benchmarks.language.grid import SOURCE, Run
from benchmarks.language.measures import accuracy, bytes_of
from benchmarks.language.methods import needs, parse
from benchmarks.language.run import Settings, Suite, Trained

_TASKS = ("subj", "goemotions", "mr")
_SEQUENCE = Run(
    scenario="sequence", target="+".join(_TASKS), shots=2, steps=3, method="clip", lr=1e-2, seed=0
)  # fmt: skip
_FRESH = Run(target="subj", shots=2, steps=9, method="clip", lr=1e-2, seed=0)


@pytest.fixture(scope="module")
def suite(folder: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    return Settings(model=str(folder), data=sets, cache=tmp_path_factory.mktemp("cache"), threads=1).start()


def _adapter(suite: Suite) -> list[Tensor]:
    return [p.detach().clone() for p in suite.model.parameters]


def _recorded(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record each training: its rows, what was kept, and the adapter before and after."""
    found: list[dict[str, Any]] = []
    train = suite.train

    def recording(run: Run, rows: Rows, kept: Any = (), **options: Any) -> Trained:
        before = _adapter(suite)
        trained = train(run, rows, kept, **options)
        found.append({"rows": rows, "kept": list(kept), "before": before, "after": _adapter(suite), **options})
        return trained

    monkeypatch.setattr(suite, "train", recording)
    return found


def test_a_sequence_trains_one_adapter_and_measures_every_task_at_its_end(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _recorded(suite, monkeypatch)
    row = suite(_SEQUENCE)
    assert [len(part["rows"].pairs) for part in found] == [12, 12, 12]
    for earlier, later in pairwise(found):
        assert all(map(torch.equal, earlier["after"], later["before"]))
    targets = [suite.target(name, 2, 0) for name in _TASKS]
    last = [accuracy(suite.model, target, suite.size) for target in targets]
    parts = [part.split() for part in row["tasks"].split("; ")]
    assert [name for name, _, _ in parts] == list(_TASKS)
    assert [float(each) for _, _, each in parts] == pytest.approx([one["target_accuracy"] for one in last], abs=1e-4)
    assert row["target_accuracy"] == pytest.approx(sum(one["target_accuracy"] for one in last) / 3)
    assert row["target_loss"] == pytest.approx(sum(one["target_loss"] for one in last) / 3)
    assert row["learnt_accuracy"] == pytest.approx(sum(float(each) for _, each, _ in parts) / 3, abs=1e-4)


@pytest.mark.parametrize("method", ["anchored:1", "ewc:10", "ewc-lora:10", "structured sources=tasks rank=4"])
def test_each_finished_task_is_remembered_where_it_ended(
    suite: Suite, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    found = _recorded(suite, monkeypatch)
    suite(replace(_SEQUENCE, method=method))
    one = method.startswith("ewc-lora")  # a sum over the tasks
    assert [len(part["kept"]) for part in found] == [0, 1, 1 if one else 2]
    if method.startswith(("anchored", "ewc:")):
        for kept, earlier in zip(found[2]["kept"], found, strict=False):
            anchors = [kept.anchor[name] for name, _ in suite.model.named]
            assert all(map(torch.equal, anchors, earlier["after"]))


def test_merged_sources_take_less_memory(suite: Suite) -> None:
    rows = [
        suite(replace(_SEQUENCE, method=f"structured sources=tasks rank=4 merge={merge}")) for merge in ("off", "on")
    ]
    assert 0 < rows[1]["source_bytes"] < rows[0]["source_bytes"]


def test_joint_training_sees_all_rows_in_as_many_steps(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _recorded(suite, monkeypatch)
    row = suite(replace(_SEQUENCE, method="joint"))
    assert [(len(part["rows"].pairs), part["steps"]) for part in found] == [(36, 9)]
    assert row["learnt_accuracy"] == row["target_accuracy"]


def test_a_transfer_starts_from_the_source_task_whatever_the_method(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _recorded(suite, monkeypatch)
    run = Run(scenario="transfer", target=f"{SOURCE}+subj", shots=2, steps=2, method="clip", lr=1e-2, seed=0)
    rows = [suite(replace(run, method=method)) for method in ("clip", "l2sp:1", "structured sources=tasks rank=4")]
    assert [len(part["rows"].pairs) for part in found] == [96, 12, 12, 12]  # the source is learnt once
    assert all(all(map(torch.equal, found[0]["after"], part["before"])) for part in found[1:])
    assert len({row["source_before"] for row in rows}) == 1
    assert all(0 <= row["source_accuracy"] <= 1 for row in rows)


@pytest.mark.parametrize("method", ["corda", "lora-null", "null", "structured start=null"])
@pytest.mark.parametrize("scenario", ["transfer", "sequence"])
def test_a_start_that_would_undo_an_earlier_task_is_refused(suite: Suite, scenario: str, method: str) -> None:
    for file in sorted(needs(parse(method)), key=str):
        suite(file)
    run = replace(_SEQUENCE, scenario=scenario, method=method)
    if scenario == "transfer":
        run = replace(run, target=f"{SOURCE}+subj")
    if (scenario, method) == ("sequence", "null"):
        assert suite(run)["drift"] > 0  # A stays where it is, so that a later task undoes nothing
        return
    with pytest.raises(ValueError, match="found one that has learnt a task"):
        suite(run)


def test_instructions_are_learnt_from_one_split_and_measured_on_the_other(
    suite: Suite, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = _recorded(suite, monkeypatch)
    run = Run(scenario="instructions", target="seed_tasks", shots=4, steps=30, method="clip", lr=1e-2, seed=0)
    row, start = suite(run), suite(replace(run, method="none", steps=0))
    assert len(found[0]["rows"].pairs) == 4
    assert row["target_loss"] < start["target_loss"]  # both splits have the same few words here
    assert row["source_before"] == start["source_accuracy"]
    assert "target_accuracy" not in row


def test_a_term_acts_on_every_fourth_step_only(suite: Suite, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    gradient = suite._gradient.__class__.__call__

    def counting(self: Any, key: object, loss: Any, inputs: Any) -> None:
        sizes.append(len(inputs))
        gradient(self, key, loss, inputs)

    monkeypatch.setattr(suite._gradient.__class__, "__call__", counting)
    every, fourth, plain = (suite(replace(_FRESH, method=m)) for m in ("replay:1", "replay:1 every=4", "clip"))
    assert sizes == [5] * 9 + [5, 3, 3, 3, 5, 3, 3, 3, 5] + [3] * 9
    assert len({row["drift"] for row in (every, fourth, plain)}) == 3


def test_a_run_of_none_measures_the_base_model(suite: Suite) -> None:
    row = suite(replace(_FRESH, method="none", steps=0, lr=0.0))
    assert row["drift"] == 0
    assert row["seconds_per_step"] is None


def test_rows_that_are_joined_have_one_shape(suite: Suite) -> None:
    parts = [suite.target(name, 2, 0).rows for name in ("subj", "clinc_work")]
    joined = Rows.joined(parts)
    assert joined.pairs == parts[0].pairs + parts[1].pairs
    assert joined.width % 16 == 0
    assert all(len(pair.prompt) + len(pair.answer) <= joined.width for pair in joined.pairs)
    assert all(len(pair.answer) <= joined.answer for pair in joined.pairs)


def test_the_bytes_of_tensors_count_shared_storage_once() -> None:
    class Holder:
        __slots__ = ("part",)

        def __init__(self, part: Tensor) -> None:
            self.part = part

    base = torch.zeros(10, dtype=torch.float32)
    assert bytes_of({"a": [base, base[:5]], "b": (Holder(torch.zeros(3, dtype=torch.float64)), None, "text")}) == 64


def test_the_stability_of_gradients_is_measured_on_request(folder: Path, sets: Path, tmp_path: Path) -> None:
    settings = Settings(model=str(folder), data=sets, cache=tmp_path, threads=1, stability=True)
    suite = settings.start()
    row = suite(_FRESH)
    plain = replace(settings, stability=False).start()(_FRESH)
    assert row["drift"] == plain["drift"]  # measuring changes nothing
    assert "coherence" not in plain
    assert 0 < row["coherence"] <= 1
    assert -1 <= row["successive_cosine"] <= 1
    assert 0 < row["alignment"] <= 1  # updates of a plain optimizer go down the loss of the pool
