"""Guide the optimizer that a real Trainer creates, with ``guide``."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradguide import Alignment, Direction, GradGuide, Magnitude, Regularizer, SourceGradient, StructuredSource, guided
from gradguide import unwrap as unwrapped
from tests.contract import kit
from tests.contract.test_trainer import bert, texts
from tests.integrations import lora
from tests.integrations.test_causal_trainer import adapted, source_of
from tests.integrations.test_causal_trainer import trainer_of as causal_trainer_of
from tests.sources.structured import problems

transformers = pytest.importorskip("transformers")

from gradguide.integrations.peft import lora_parameters  # noqa: E402
from gradguide.integrations.transformers import GradGuideCallback, guide, sampled_loss  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")


def guide_of(trainer: Any) -> GradGuide:
    found = unwrapped(trainer.optimizer)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("args", "kind"),
    [
        ({"learning_rate": 3e-3, "adam_beta1": 0.8, "adam_beta2": 0.95}, torch.optim.AdamW),
        ({"optim": "sgd", "weight_decay": 0.3}, torch.optim.SGD),
        ({"optim": "adagrad"}, torch.optim.Adagrad),
        ({"optim": "adafactor"}, None),
    ],
    ids=["adamw", "sgd", "adagrad", "adafactor"],
)
def test_the_base_is_the_trainer_s_own_optimizer(tmp_path: Path, args: dict[str, Any], kind: Any) -> None:
    trainer, plain = (made(tmp_path, args) for _ in range(2))
    guide(trainer)
    wanted = plain.create_optimizer()
    found = trainer.create_optimizer()
    assert isinstance(found, GradGuide)
    assert trainer.optimizer is found
    assert type(found.base) is type(wanted)
    assert kind is None or type(found.base) is kind
    assert found.defaults == wanted.defaults
    for group, other in zip(found.param_groups, wanted.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in other.items() if k != "params"}
        assert [p.shape for p in group["params"]] == [p.shape for p in other["params"]]
    assert trainer.create_optimizer() is found, "a second train() keeps it"


def made(folder: Path, args: dict[str, Any], model: nn.Module | None = None, **extra: Any) -> Any:
    """Return a Trainer on a tiny classifier."""
    options = {"max_steps": 4, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "logging_steps": 1}
    options |= {"disable_tqdm": True, "save_steps": 2, "learning_rate": 1e-2}
    arguments = transformers.TrainingArguments(output_dir=str(folder), **(options | args))
    if "model_init" not in extra:
        extra["model"] = bert() if model is None else model
    return transformers.Trainer(args=arguments, train_dataset=texts(), **extra)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_equals_a_trainer_with_the_same_gradguide_passed_to_it(tmp_path: Path, accumulate: int) -> None:
    args = {"max_grad_norm": 0.0, "gradient_accumulation_steps": accumulate}
    rules: dict[str, Any] = {"direction": Direction(decay=0.8), "magnitude": Magnitude(max_norm=0.3)}
    trainer = made(tmp_path / "guided", args)
    guide(trainer, **rules)
    trainer.train()
    other = made(tmp_path / "other", args)
    base = other.create_optimizer()
    other.optimizer = GradGuide(base, **rules)
    other.train()
    assert guide_of(trainer).metrics()["steps"] == trainer.state.global_step == 4
    kit.assert_same(kit.parameters_of(trainer.model), kit.parameters_of(other.model))


def test_with_all_rules_off_training_is_bitwise_the_trainer_s_own(tmp_path: Path) -> None:
    trainer, plain = (made(tmp_path / name, {"max_grad_norm": 0.0}) for name in ("guided", "plain"))
    guide(trainer, direction=None, magnitude=None)
    trainer.train()
    plain.train()
    kit.assert_same(kit.parameters_of(trainer.model), kit.parameters_of(plain.model))


@pytest.mark.parametrize("limit", [0.01, 1.0, 1000.0])
def test_clipping_alone_equals_the_trainer_s_clipping(tmp_path: Path, limit: float) -> None:
    args = {"max_grad_norm": limit, "optim": "sgd"}
    trainer, plain = (made(tmp_path / name, args) for name in ("guided", "plain"))
    guide(trainer, direction=None, magnitude=Magnitude(max_norm=limit, max_update=None))
    trainer.train()
    plain.train()
    torch.testing.assert_close(kit.parameters_of(trainer.model), kit.parameters_of(plain.model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("limit", "options", "bound"),
    [
        (0.25, {}, 0.25),
        (1, {}, 1.0),
        (0.0, {}, math.inf),
        (0.25, {"magnitude": Magnitude(max_norm=3.0)}, 3.0),
        (0.25, {"magnitude": None}, None),
    ],
)
def test_the_trainer_s_clipping_moves_to_gradguide(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, limit: float, options: dict[str, Any], bound: float | None
) -> None:
    trainer = made(tmp_path, {"max_grad_norm": limit})
    given = trainer.args
    with caplog.at_level(logging.WARNING, "gradguide"):
        guide(trainer, **options)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == (1 if limit else 0)
    assert all(f"max_grad_norm={limit}" in line for line in lines)
    assert trainer.args.max_grad_norm == 0
    assert given.max_grad_norm == limit, "the caller's arguments serve other trainers too"
    rule = trainer.create_optimizer()._engine.rules.magnitude
    assert (None if rule is None else rule.max_norm) == bound


def test_metrics_are_in_the_logs_once_and_no_warning_is_given(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for callbacks in ([], [GradGuideCallback()]):
            trainer = made(tmp_path, {}, callbacks=callbacks)
            guide(trainer)
            trainer.train()
            kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
            assert kinds.count(GradGuideCallback) == 1
            logged = [row for row in trainer.state.log_history if "loss" in row]
            assert [row["gradguide/steps"] for row in logged] == [1, 2, 3, 4]
            assert all(math.isfinite(row["grad_norm"]) for row in logged), "Trainer still logs the norm"


def test_the_callback_alone_warns_if_the_trainer_clips_too(tmp_path: Path) -> None:
    for limit, count in ((1.0, 1), (0.0, 0), (math.inf, 0)):
        trainer = made(tmp_path, {"max_grad_norm": limit, "max_steps": 1}, callbacks=[GradGuideCallback()])
        trainer.optimizer = GradGuide(trainer.create_optimizer(), direction=Direction())
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.train()
        assert len([w for w in found if "max_grad_norm" in str(w.message)]) == count, limit


def test_resuming_is_bitwise(tmp_path: Path) -> None:
    trainer = made(tmp_path, {})
    guide(trainer)
    trainer.train()
    model = bert()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    resumed = made(tmp_path, {}, model)
    guide(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    kit.assert_same(kit.parameters_of(model), kit.parameters_of(trainer.model))
    kit.assert_same(guide_of(resumed).state_dict()["state"], guide_of(trainer).state_dict()["state"])


def test_a_second_train_goes_on_with_the_same_optimizer(tmp_path: Path) -> None:
    trainer = made(tmp_path, {"max_steps": 2})
    guide(trainer)
    trainer.train()
    first = guide_of(trainer)
    trainer.train()
    assert guide_of(trainer) is first
    assert first.metrics()["steps"] == 4


def test_a_model_made_anew_at_each_train_gets_an_optimizer_of_its_own(tmp_path: Path) -> None:
    trainer = made(tmp_path, {"max_steps": 2}, model_init=bert)
    guide(trainer)
    trainer.train()
    first = guide_of(trainer)
    trainer.train()
    second = guide_of(trainer)
    assert second is not first
    assert second.metrics()["steps"] == 2
    assert {p for g in second.param_groups for p in g["params"]} == set(trainer.model.parameters())


def test_a_stored_source_is_matched_by_the_names_of_the_model(tmp_path: Path) -> None:
    model = adapted()
    trainer = causal_trainer_of(model, tmp_path)
    guide(trainer, Alignment(source_of(model)))
    trainer.train()
    assert guide_of(trainer).metrics()["source_cosine"] != 0


def test_names_can_be_a_function_of_the_model(tmp_path: Path) -> None:
    model = adapted()
    source = source_of(model)
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_(True)  # not in the source
    trainer = causal_trainer_of(model, tmp_path, steps=1)
    guide(trainer, Alignment(source), names=lora_parameters)
    trainer.train()
    assert guide_of(trainer).metrics()["source_cosine"] != 0
    assert len(guide_of(trainer)._engine.planner.name_lookup.found) == len(lora_parameters(model))


def structured(model: nn.Module) -> StructuredSource:
    return StructuredSource.capture(model, problems.text(4), sampled_loss, rank=4)


@pytest.mark.parametrize(
    ("adapter", "form"),
    [(True, "one"), (False, "one"), (False, "list"), (False, "mapping")],
    ids=["adapter", "whole weights", "whole weights, list", "whole weights, mapping"],
)
def test_a_structured_source_pulls_and_resumes_bitwise(tmp_path: Path, adapter: bool, form: str) -> None:
    made = structured(problems.llama())
    source: Any = {"one": made, "list": [made], "mapping": {"base": made}}[form]

    def run(resume: str | None = None) -> Any:
        model: nn.Module = problems.llama()
        if adapter:
            torch.manual_seed(0)
            model = problems.adapted(model)
        trainer = causal_trainer_of(model, tmp_path)
        guide(trainer, alignment=Alignment(source))
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    first = run()
    logged = [row["gradguide/source_drift"] for row in first.state.log_history if "loss" in row]
    assert len(logged) == 4
    assert logged[0] == 0
    assert logged[-1] > 0
    resumed = run(str(tmp_path / "checkpoint-2"))
    kit.assert_same(kit.parameters_of(resumed.model), kit.parameters_of(first.model))
    kit.assert_same(guide_of(resumed).state_dict()["state"], guide_of(first).state_dict()["state"])
    assert resumed.state.log_history[-2]["gradguide/source_drift"] == logged[-1]


def test_an_adapter_added_after_the_call_is_guided(tmp_path: Path) -> None:
    base = problems.llama()
    source = structured(base)
    trainer = causal_trainer_of(base, tmp_path, steps=2)
    guide(trainer, alignment=Alignment({"text": source}))
    torch.manual_seed(0)
    trainer.model = trainer.model_wrapped = problems.adapted(base)
    trainer.train()
    found = guide_of(trainer)
    assert {p for g in found.param_groups for p in g["params"]} == {p for _, p in lora_parameters(trainer.model)}
    assert found.metrics()["source_drift"] > 0


def test_an_adapter_that_was_loaded_frozen_is_named_with_the_way_out(tmp_path: Path) -> None:
    """PEFT loads adapters frozen by default, and Trainer then makes an optimizer of empty groups."""
    model = adapted()
    model.requires_grad_(False)
    trainer = causal_trainer_of(model, tmp_path, steps=1)
    guide(trainer)
    with pytest.raises(ValueError, match=r"has no parameters.*from_pretrained\(model, path, is_trainable=True\)"):
        trainer.train()


def test_seq2seq_trainer_is_guided(tmp_path: Path) -> None:
    config = transformers.T5Config(
        vocab_size=40, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    arguments = transformers.Seq2SeqTrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True, logging_steps=1
    )
    rows = [{"input_ids": torch.arange(i, i + 5), "labels": torch.arange(i, i + 3)} for i in range(8)]
    trainer = transformers.Seq2SeqTrainer(
        transformers.T5ForConditionalGeneration(config), arguments, train_dataset=rows
    )
    guide(trainer)
    trainer.train()
    assert guide_of(trainer).metrics()["steps"] == 2
    assert "gradguide/grad_norm" in trainer.state.log_history[0]


@pytest.mark.parametrize(("arguments", "rate"), [({}, 5e-3), ({"lr": 0.25}, 0.25)])
def test_a_guided_class_takes_the_trainer_s_rate_unless_it_has_one(
    tmp_path: Path, arguments: dict[str, Any], rate: float
) -> None:
    magnitude = Magnitude(max_norm=3.0)
    kind = guided(torch.optim.SGD, magnitude=magnitude)
    trainer = made(tmp_path, {"learning_rate": 5e-3}, optimizer_cls_and_kwargs=(kind, arguments))
    guide(trainer, direction=None)
    optimizer = trainer.create_optimizer()
    assert type(optimizer.base) is torch.optim.SGD
    assert optimizer.defaults["lr"] == rate
    assert optimizer._engine.rules.magnitude == magnitude
    assert optimizer._engine.rules.direction is None


def test_a_guided_class_takes_the_rate_that_the_trainer_has_when_it_creates_the_optimizer(tmp_path: Path) -> None:
    trainer = made(tmp_path, {"max_steps": 1}, model_init=bert, optimizer_cls_and_kwargs=(guided(torch.optim.SGD), {}))
    guide(trainer)
    for rate in (5e-3, 0.25):  # as the trials of a hyperparameter search
        trainer.args.learning_rate = rate
        trainer.train()
        assert guide_of(trainer).defaults["lr"] == rate


def test_what_cannot_be_guided_is_refused_with_the_way_out_and_nothing_changes(tmp_path: Path) -> None:
    with_optimizer = made(tmp_path, {}, optimizers=(torch.optim.SGD(bert().parameters(), lr=0.1), None))
    created = made(tmp_path, {})
    created.create_optimizer()
    twice = made(tmp_path, {})
    guide(twice)
    own = made(tmp_path, {}, optimizer_cls_and_kwargs=(type("Own", (GradGuide,), {}), {}))
    double = made(tmp_path, {}, optimizer_cls_and_kwargs=(guided(torch.optim.AdamW, direction=None), {}))
    deepspeed = made(tmp_path, {})
    deepspeed.is_deepspeed_enabled = True
    plain = made(tmp_path, {})
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (with_optimizer, {}, ValueError, "has an optimizer already, found SGD: call guide.* without optimizers="),
        (created, {}, ValueError, "has an optimizer already, found AdamW"),
        (twice, {}, ValueError, "guided already"),
        (own, {}, ValueError, "Own is a GradGuide already"),
        (double, {"direction": Direction()}, ValueError, r"direction: given to guided\(...\) and to guide"),
        (deepspeed, {}, ValueError, "DeepSpeed.*DDP.*FSDP"),
        (plain, {"regularizer": Regularizer(direction=1.0)}, ValueError, "leave regularizer=None"),
        (plain, {"colour": "red"}, TypeError, "colour"),
        (bert(), {}, TypeError, "takes a transformers.Trainer, found BertForSequenceClassification"),
    ]
    for trainer, options, kind, message in cases:
        before = dict(vars(trainer))
        with pytest.raises(kind, match=message):
            guide(trainer, **options)
        assert vars(trainer) == before
        callbacks = [] if trainer is twice or isinstance(trainer, nn.Module) else trainer.callback_handler.callbacks
        assert not any(isinstance(callback, GradGuideCallback) for callback in callbacks)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"direction": 3}, "direction"),
        ({"alignment": 3}, "alignment"),
        ({"names": lambda model: {}, "alignment": "other"}, "found none: pass names=model"),
        ({"alignment": "other"}, "missing from the source"),
    ],
    ids=["kind of a rule", "kind of the alignment", "names that match nothing", "source of another model"],
)
def test_bad_options_raise_before_the_first_step(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    if options.get("alignment") == "other":
        other = lora.Classifier(lora.bert())
        source = SourceGradient.capture(other, lora.examples(1), lora.cross_entropy)
        options = {**options, "alignment": Alignment(source)}
    trainer = made(tmp_path, {})
    start = kit.parameters_of(trainer.model)
    guide(trainer, **options)
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.train()
    kit.assert_same(kit.parameters_of(trainer.model), start)
    assert trainer.state.global_step == 0
