"""Guide TRL's trainers with ``guide``, on tiny random models and ``peft_config``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from gradguide import Alignment, StructuredSource, unwrap
from gradguide.integrations.peft import lora_parameters
from gradguide.integrations.transformers import guide, sampled_loss
from tests.contract import kit
from tests.sources.structured import problems

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

WORDS = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, problems.VOCABULARY)}


def tokenizer() -> Any:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(WORDS, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def words(count: int, seed: int) -> list[str]:
    ids = torch.randint(3, problems.VOCABULARY, (count, 6), generator=torch.Generator().manual_seed(seed))
    return [" ".join(f"w{i}" for i in row) for row in ids.tolist()]


PAIRS = {"prompt": words(12, 0), "chosen": words(12, 1), "rejected": words(12, 2)}


def alternating(completions: list[str], **_: Any) -> list[float]:
    """Return rewards that differ within each group of two, so that there is a gradient."""
    return [float(index % 2) for index in range(len(completions))]


def parts(kind: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return trainer class, config class, columns, and extra arguments of config and trainer."""
    if kind == "sft":
        return trl.SFTTrainer, trl.SFTConfig, {"text": PAIRS["prompt"]}, {}, {}
    if kind == "dpo":
        return trl.DPOTrainer, trl.DPOConfig, PAIRS, {}, {}
    if kind == "kto":
        columns = {"prompt": PAIRS["prompt"], "completion": PAIRS["chosen"], "label": [True, False] * 6}
        return trl.KTOTrainer, trl.KTOConfig, columns, {}, {}
    if kind == "grpo":
        extra = {"num_generations": 2, "max_completion_length": 4}
        return trl.GRPOTrainer, trl.GRPOConfig, {"prompt": PAIRS["prompt"]}, extra, {"reward_funcs": alternating}
    assert kind == "reward"
    return trl.RewardTrainer, trl.RewardConfig, {k: PAIRS[k] for k in ("chosen", "rejected")}, {}, {}


def model_of(kind: str) -> Any:
    base = problems.llama(layers=1)
    if kind != "reward":
        return base
    base.config.num_labels, base.config.pad_token_id = 1, 0
    torch.manual_seed(0)
    return transformers.LlamaForSequenceClassification(base.config)


def trainer_of(kind: str, folder: Path, **args: Any) -> Any:
    trainer, config, columns, configured, extra = parts(kind)
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "logging_steps": 1, "save_steps": 2, "report_to": []}
    options |= {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True}
    arguments = config(str(folder), **(options | configured | args))
    task = "SEQ_CLS" if kind == "reward" else "CAUSAL_LM"
    torch.manual_seed(0)
    return trainer(
        model=model_of(kind),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type=task),
        **extra,
    )


KINDS = ("sft", "dpo", "kto", "grpo", "reward")


@pytest.mark.parametrize("kind", KINDS)
def test_i05_a_trl_trainer_with_peft_config_is_guided(tmp_path: Path, kind: str) -> None:
    trainer = trainer_of(kind, tmp_path, max_steps=2, gradient_accumulation_steps=2, learning_rate=1e-2)
    before = kit.parameters_of(trainer.model)
    guide(trainer)
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    assert optimizer is not None
    assert type(optimizer.base) is torch.optim.AdamW
    assert optimizer.base.defaults["lr"] == 1e-2
    assert optimizer.metrics()["steps"] == trainer.state.global_step == 2
    names = optimizer._engine.planner.name_lookup.of(p for g in optimizer.param_groups for p in g["params"])
    assert set(names.values()) >= {name for name, _ in lora_parameters(trainer.model)}
    assert trainer.args.max_grad_norm == 0
    logged = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["gradguide/steps"] for row in logged] == [1, 2]
    assert kit.differ(kit.parameters_of(trainer.model), before)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_i03_a_structured_source_pulls_and_the_run_resumes_bitwise(tmp_path: Path, kind: str) -> None:
    source = StructuredSource.capture(problems.llama(layers=1), problems.text(4), sampled_loss, rank=4)
    trainers = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = trainer_of(kind, tmp_path, learning_rate=1e-2)
        guide(trainer, alignment=Alignment(source))
        trainer.train(resume_from_checkpoint=resume)
        trainers.append(trainer)
    first, resumed = trainers
    assert first.state.log_history[-2]["gradguide/source_drift"] > 0
    kit.assert_same(kit.parameters_of(resumed.model), kit.parameters_of(first.model))
    states = [unwrap(trainer.optimizer) for trainer in trainers]
    assert all(state is not None for state in states)
    kit.assert_same(*(state.state_dict()["state"] for state in states if state is not None))
