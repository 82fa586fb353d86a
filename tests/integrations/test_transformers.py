"""Run GradGuideCallback in a real Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gradguide import Direction, guided
from tests.contract.test_trainer import bert, trainer_of
from tests.integrations.reads import count_reads

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


def reporter(rows: list[dict[str, float]]) -> Any:
    """Return a callback that records the logs that reporters such as TensorBoard receive."""

    class Reporter(transformers.TrainerCallback):  # type: ignore[misc, name-defined]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            rows.append(dict(logs))

    return Reporter()


def train(folder: Path, *, steps: int = 4, every: int = 1, **extra: Any) -> tuple[Any, list[dict[str, float]]]:
    from gradguide.integrations.transformers import GradGuideCallback

    rows: list[dict[str, float]] = []
    trainer = trainer_of(bert(), folder, steps=steps, callbacks=[GradGuideCallback()], **extra)
    trainer.args.logging_steps = trainer.state.logging_steps = every
    # The position of Trainer's reporters: after the flow callback, before user callbacks.
    trainer.callback_handler.callbacks.insert(1, reporter(rows))
    trainer.train()
    return trainer, rows


def test_metrics_reach_the_history_and_the_reporters(tmp_path: Path) -> None:
    options = {"direction": Direction(decay=0.8)}
    trainer, rows = train(tmp_path, optimizer_cls_and_kwargs=(guided(torch.optim.AdamW, **options), {"lr": 1e-2}))
    logged = [row for row in trainer.state.log_history if "loss" in row]
    reported = [row for row in rows if "loss" in row]
    assert [row["gradguide/steps"] for row in logged] == [1, 2, 3, 4]
    for row, sent in zip(logged, reported, strict=True):
        assert row["gradguide/coherence"] == sent["gradguide/coherence"]
        assert 0 < row["gradguide/coherence"] <= 1
        assert "gradguide/source_cosine" not in row, "what was not measured is left out"
    assert not any("gradguide/steps" in row for row in trainer.state.log_history if "loss" not in row)


def test_metrics_are_read_at_logging_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = count_reads(monkeypatch)
    train(tmp_path, steps=6, every=3, optimizer_cls_and_kwargs=(guided(torch.optim.AdamW), {"lr": 1e-2}))
    assert len(read) == 2


def test_every_callback_is_still_called_once_per_event(tmp_path: Path) -> None:
    optimizer = (guided(torch.optim.AdamW), {"lr": 1e-2})
    trainer, _ = train(tmp_path, optimizer_cls_and_kwargs=optimizer)
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert names[0] == "GradGuideCallback"
    assert len(names) == len(set(names))
    assert trainer.state.global_step == 4


def test_another_optimizer_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GradGuide as the Trainer's optimizer, found"):
        train(tmp_path)
