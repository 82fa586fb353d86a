"""Runs of every method on a tiny model: what they train on, that they repeat, and what they measure."""

from __future__ import annotations

import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.language import grid, sources
from benchmarks.language.data import Batch, Pair, padded
from benchmarks.language.grid import Run
from benchmarks.language.measures import accuracy
from benchmarks.language.methods import family, needs, parse
from benchmarks.language.model import answer_loss
from benchmarks.language.run import Settings, Suite
from benchmarks.language.sources import Spec, digest
from benchmarks.language.training import Training, scheduler

_RUN = Run(target="subj", shots=2, steps=2, method="clip", lr=1e-2, seed=0)
_METHODS = list(dict.fromkeys(run.method for run in grid.research()))
_FAMILIES = {(run.scenario, family(run.method)): run for run in reversed(grid.smoke())}
_RUNS = [*(replace(_RUN, method=method) for method in _METHODS), *_FAMILIES.values()]
"""Every variant, and every method of every scenario at one of its strengths."""


@pytest.fixture(scope="module")
def suite(folder: Path, sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Suite:
    cache = tmp_path_factory.mktemp("cache")
    made = Settings(model=str(folder), data=sets, cache=cache, threads=1).start()
    files = {file for run in _RUNS for file in needs(parse(run.method))}
    with warnings.catch_warnings():
        # Transformers has renamed an argument of which own_text takes the earlier name.
        warnings.filterwarnings("ignore", message="`past_key_values` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*received fewer sequences than the rank", category=UserWarning)
        for file in sorted(files, key=lambda file: isinstance(file, Spec)):
            made(file)
    return made


@pytest.mark.parametrize("run", _RUNS, ids=lambda run: f"{run.scenario} {run.method}")
def test_every_method_of_every_scenario_trains(suite: Suite, run: Run) -> None:
    row = suite(run)
    assert all(math.isfinite(row[name]) for name in ("target_loss", "drift", "drift_answers"))
    assert set(row) <= set(grid.COLUMNS)
    if run.method.startswith("early") or run.steps == 0:
        return  # an adapter within the budget may be that of the start
    assert row["drift"] > 0
    assert (row["modelled_drift"] is not None) == run.method.startswith("structured")
    keeps = not run.method.startswith(
        ("clip", "quarter", "defaults", "l2sp", "joint", "null", "lora-null", "corda", "osf")
    )
    assert (row["source_bytes"] > 0) == keeps


def test_shared_files_of_a_model_are_for_that_model_and_code(
    folder: Path, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str:
        return digest(str(model), sets, torch.device("cpu"))

    model = tmp_path / "model"
    shutil.copytree(folder, model)
    first, weights = found(), load_file(model / "model.safetensors")
    assert found() == first
    # A fine-tuned model has files of the same names and sizes.
    save_file({name: value + 1 for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    second = found()
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    third = found()
    assert second != third
    code = tmp_path / "sampling.py"
    code.write_text("another way to write text")
    assert {path.name for path in sources._CODE} > {"sampling.py", "starts.py", "data.py", "capture.py"}
    monkeypatch.setattr(sources, "_CODE", [code])
    assert found() != third


def test_a_run_repeats_whatever_ran_before(suite: Suite) -> None:
    def measured(run: Run) -> dict[str, float]:
        return {name: value for name, value in suite(run).items() if "seconds" not in name}

    first = {method: measured(replace(_RUN, method=method)) for method in ("clip", "structured", "osf:0.5")}
    for other in ("null", "osf:0.5", "osf:0.9"):
        suite(replace(_RUN, method=other, seed=3))
    assert {method: measured(replace(_RUN, method=method)) for method in first} == first
    assert measured(replace(_RUN, seed=1)) != first["clip"]


def test_the_adapter_starts_anew_as_peft_makes_it(suite: Suite) -> None:
    suite(_RUN)
    suite.model.reset(5)
    a = torch.cat([p.detach().flatten() for name, p in suite.model.named if ".lora_A." in name])
    assert not any(bool(p.any()) for p in suite.model.lora_b)
    assert all(p.grad is None and p.requires_grad for p in suite.model.parameters)
    assert 0 < float(a.abs().max()) <= 1 / math.sqrt(32)  # kaiming_uniform(a=sqrt(5)) is uniform in 1 / sqrt(in)
    suite.model.reset(5)
    again = torch.cat([p.detach().flatten() for name, p in suite.model.named if ".lora_A." in name])
    assert torch.equal(a, again)


def test_the_momentum_of_the_base_can_be_the_direction(suite: Suite) -> None:
    own, shared = (suite(replace(_RUN, steps=10, method=f"structured direction={kind}")) for kind in ("on", "shared"))
    assert shared["drift"] > 0
    assert shared["drift"] != own["drift"]


def test_training_moves_away_from_the_base_model_and_a_reset_returns_to_it(suite: Suite) -> None:
    suite(replace(_RUN, steps=10))
    assert suite.drift()["drift"] > 0
    suite.model.reset(1)
    assert suite.drift() == {"drift": 0.0, "drift_answers": 0.0}


def test_padding_does_not_change_the_loss_of_the_answers(suite: Suite) -> None:
    pairs = [Pair([5, 6, 7], [8, 9]), Pair([9, 8, 7, 6, 5], [10])]
    expected = []
    for prompt, answer in pairs:
        logits = suite.model.model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        expected.append([-logits[len(prompt) + i - 1, token] for i, token in enumerate(answer)])
    batch = padded(pairs, width=16, answer=4)
    total = sum(sum(losses) for losses in expected)
    for unit, count in (("row", 2), ("token", 3)):
        torch.testing.assert_close(answer_loss(suite.model, Batch(*batch), unit), total / count)


def test_accuracy_chooses_the_likeliest_label(suite: Suite) -> None:
    suite(replace(_RUN, steps=20))
    target = suite.target(_RUN.target, _RUN.shots, _RUN.seed)
    right, losses = 0, []
    rows = target.test[: suite.size.rows]
    for prompt, gold in rows:
        scores = []
        for label in target.labels:
            logits = suite.model.model(input_ids=torch.tensor([prompt + label])).logits[0].log_softmax(-1)
            scores.append(-sum(float(logits[len(prompt) + i - 1, token].detach()) for i, token in enumerate(label)))
        means = [score / len(label) for score, label in zip(scores, target.labels, strict=True)]
        right += means.index(min(means)) == gold
        losses.append(scores[gold])
    found = accuracy(suite.model, target, suite.size)
    assert found["target_accuracy"] == pytest.approx(right / len(rows))
    assert found["target_loss"] == pytest.approx(sum(losses) / len(rows), rel=1e-4)


def test_a_start_in_the_unused_space_keeps_its_length(suite: Suite) -> None:
    suite.model.reset(0)
    before = {name: p.detach().clone() for name, p in suite.model.named}
    unused = suite.sources.unused()
    suite.model.start_in(unused)
    for name, layer in suite.model.layers():
        a = layer.lora_A["default"].weight
        torch.testing.assert_close(a @ unused[name] @ unused[name].mT, a, rtol=1e-4, atol=1e-6)
    for name, p in suite.model.named:
        torch.testing.assert_close(p.norm(dim=1), before[name].norm(dim=1))


@pytest.mark.parametrize("text", ["nothing", "clip rank=3", "structured rank", "structured tree=1"])
def test_an_unknown_method_or_option_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="found"):
        parse(text)


@pytest.mark.parametrize("method", ["clip", "structured"])
def test_a_linear_schedule_falls_to_zero_and_trains_less(suite: Suite, method: str) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    made = scheduler(Training(optimizer=optimizer), parse(f"{method} schedule=linear"), 4)
    assert made is not None
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        made.step()
    assert rates == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert optimizer.param_groups[0]["lr"] == 0
    constant, linear = (suite(replace(_RUN, method=method + schedule)) for schedule in ("", " schedule=linear"))
    assert 0 < linear["drift"] < constant["drift"]


def test_an_unknown_schedule_is_refused(suite: Suite) -> None:
    with pytest.raises(ValueError, match="schedule must be 'constant' or 'linear', found 'cosine'"):
        suite(replace(_RUN, method="clip schedule=cosine"))


@pytest.mark.parametrize("method", ["null", "structured start=null train=b"])
def test_a_frozen_a_stays_where_it_starts_and_is_trained_again_after_a_reset(suite: Suite, method: str) -> None:
    suite(replace(_RUN, steps=10, method=method))
    unused = suite.sources.unused()
    for name, layer in suite.model.layers():
        a, b = suite.model.factors(layer)
        torch.testing.assert_close(a @ unused[name] @ unused[name].mT, a, rtol=1e-4, atol=1e-6)
        assert bool(b.any())
    suite.model.reset(0)
    assert [p for _, p in suite.model.named] == suite.model.parameters
    assert all(p.requires_grad for p in suite.model.parameters)
