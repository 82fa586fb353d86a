"""Hugging Face's Trainer around GradGuide, with a random model made in memory (rows 3, 5, 9, 10)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradguide import Direction, GradGuide, Magnitude, guided, unwrap
from tests.contract import kit

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

RULES: dict[str, Any] = {"direction": Direction(decay=0.8), "magnitude": Magnitude(max_norm=0.5)}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    torch.manual_seed(3)
    model: nn.Module = transformers.BertForSequenceClassification(config)
    return model


def texts(count: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(20, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row.sum() % 3} for row in ids]


def trainer_of(model: nn.Module, folder: Path, *, steps: int = 4, **extra: Any) -> Any:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_grad_norm": 1e9}
    options |= extra.pop("args", {})
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=2,
        logging_steps=1,
        seed=0,
        **options,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=texts(), **extra)


def wrapped_adamw(model: nn.Module) -> tuple[GradGuide, Any]:
    optimizer = GradGuide(torch.optim.AdamW(model.parameters(), lr=1e-2), **RULES)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 10)


def test_i05_trainer_takes_a_gradguide_as_optimizers(tmp_path: Path) -> None:
    model = bert()
    start = kit.parameters_of(model)
    optimizer, scheduler = wrapped_adamw(model)
    trainer = trainer_of(model, tmp_path, optimizers=(optimizer, scheduler))
    trainer.train()
    assert unwrap(trainer.optimizer) is optimizer
    assert unwrap(trainer.accelerator._optimizers[0]) is optimizer
    assert optimizer.metrics()["steps"] == trainer.state.global_step == 4
    assert optimizer.metrics()["guided_norm"] * optimizer.metrics()["clip_factor"] <= 0.5 + 1e-5
    assert optimizer.param_groups is optimizer.base.param_groups
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - 4 / 10))
    assert kit.differ(kit.parameters_of(model), start)


def test_i05_trainer_run_equals_the_plain_loop(tmp_path: Path) -> None:
    model, plain = bert(), bert()
    optimizer, scheduler = wrapped_adamw(model)
    trainer = trainer_of(model, tmp_path, optimizers=(optimizer, scheduler))
    trainer.train()
    other, other_scheduler = wrapped_adamw(plain)
    transformers.set_seed(0)
    batches = list(trainer_of(bert(), tmp_path / "other").get_train_dataloader())
    assert len(batches) == 8
    for batch in batches[:4]:
        other.zero_grad()
        plain(**batch).loss.backward()
        other.step()
        other_scheduler.step()
    torch.testing.assert_close(kit.parameters_of(model), kit.parameters_of(plain), rtol=1e-4, atol=1e-5)
    assert optimizer.metrics() == pytest.approx(other.metrics(), rel=1e-3, abs=1e-5, nan_ok=True)


def test_i05_trainer_takes_class_and_options(tmp_path: Path) -> None:
    model = bert()
    made = guided(torch.optim.AdamW, **RULES)
    trainer = trainer_of(model, tmp_path, optimizer_cls_and_kwargs=(made, {"lr": 1e-2, "betas": (0.8, 0.9)}))
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    assert optimizer is not None
    assert isinstance(optimizer.base, torch.optim.AdamW)
    assert optimizer.metrics()["steps"] == 4
    # Trainer makes two groups: without weight decay for biases and norms, and with it.
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert optimizer.base.defaults["betas"] == (0.8, 0.9)
    assert optimizer.param_groups[0]["lr"] == 0.0, "the linear schedule ran to its end"
    assert len(kit.directions_of(optimizer)) == len([p for p in model.parameters() if p.requires_grad])


def test_i03_trainer_resumes_where_it_stopped(tmp_path: Path) -> None:
    """A new Trainer with another model loads the checkpoint of step 2 and ends like the first run."""
    model = bert()
    optimizer, scheduler = wrapped_adamw(model)
    trainer_of(model, tmp_path, optimizers=(optimizer, scheduler)).train()

    other_model = bert()
    with torch.no_grad():
        for parameter in other_model.parameters():
            parameter.add_(0.1)
    other, other_scheduler = wrapped_adamw(other_model)
    resumed = trainer_of(other_model, tmp_path, optimizers=(other, other_scheduler))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.metrics()["steps"] == 4
    kit.assert_same(kit.parameters_of(other_model), kit.parameters_of(model))
    kit.assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_i10_trainer_with_accumulation_counts_real_steps(tmp_path: Path) -> None:
    """At a rate of 0 both runs have the same gradients up to scale: Trainer sums some micro-batches."""
    runs = []
    for size, accumulate in ((4, 1), (2, 2)):
        model = bert()
        optimizer = GradGuide(kit.sgd(model.parameters(), lr=0.0), **RULES)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        args = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        trainer = trainer_of(model, tmp_path / str(size), optimizers=(optimizer, scheduler), args=args)
        trainer.train()
        assert optimizer.metrics()["steps"] == trainer.state.global_step == 4
        runs.append((kit.directions_of(optimizer), optimizer.metrics()["coherence"]))
    assert any(d.any() for d in runs[0][0].values())
    torch.testing.assert_close(runs[1][0], runs[0][0], rtol=1e-3, atol=1e-5)
    assert runs[1][1] == pytest.approx(runs[0][1], rel=1e-4)


def test_i09_trainer_clips_first_and_metrics_say_what_arrived(tmp_path: Path) -> None:
    model = bert()
    optimizer, scheduler = wrapped_adamw(model)
    received: list[float] = []
    optimizer.register_step_post_hook(lambda opt, args, kwargs: received.append(optimizer.metrics()["grad_norm"]))
    trainer = trainer_of(model, tmp_path, optimizers=(optimizer, scheduler), args={"max_grad_norm": 0.01})
    trainer.train()
    assert len(received) == 4
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(logged) == 4
    assert all(norm > 0.1 for norm in logged), "Trainer logs the norm before its own clipping"
    assert received == pytest.approx([0.01] * 4, rel=1e-3), "GradGuide receives the clipped one"


def test_i21_trainer_checkpoint_is_read_without_unpickling(tmp_path: Path) -> None:
    model = bert()
    optimizer, scheduler = wrapped_adamw(model)
    trainer_of(model, tmp_path, optimizers=(optimizer, scheduler), steps=2).train()
    state = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    kit.assert_same(state, copy.deepcopy(optimizer.state_dict()))
    assert all("gradguide.direction" in entry for entry in state["state"].values())
