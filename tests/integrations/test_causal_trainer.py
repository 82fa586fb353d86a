"""Train a causal language model with LoRA in Trainer and TRL's SFTTrainer, guided by a source."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from gradguide import Alignment, Direction, GradGuide, SourceGradient, guided, unwrap
from gradguide.integrations.peft import lora_parameters
from tests.contract import kit
from tests.integrations import lora

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


def texts(seed: int, count: int = 16) -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 40, (count, 7), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def adapted() -> nn.Module:
    model: nn.Module = lora.llama()
    lora.move(model)
    return model


def source_of(model: nn.Module) -> SourceGradient:
    old = [torch.stack([row["input_ids"] for row in texts(seed=1)[i : i + 4]]) for i in (0, 4, 8)]
    return SourceGradient.capture(model, old, loss_of)


def guide(model: nn.Module, source: SourceGradient) -> GradGuide:
    base = torch.optim.AdamW([p for _, p in lora_parameters(model)], lr=1e-2)
    return GradGuide(base, alignment=Alignment(source, weight=0.5), names=lora_parameters(model), direction=Direction())


def trainer_of(model: nn.Module, folder: Path, steps: int = 4, **extra: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(model=model, args=arguments, train_dataset=texts(seed=0), **extra)


def constant(optimizer: GradGuide) -> tuple[GradGuide, Any]:
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)


def test_i03_a_guided_adapter_resumes_bitwise(tmp_path: Path) -> None:
    model = adapted()
    source = source_of(model)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = guide(model, source)
    trainer_of(model, tmp_path, optimizers=constant(optimizer)).train()
    assert optimizer.metrics()["steps"] == 4
    assert optimizer.metrics()["source_cosine"] != 0
    kit.assert_same({name: dict(model.named_parameters())[name].detach() for name in base}, base)

    other_model = lora.llama()  # the checkpoint must restore its adapter
    other = guide(other_model, source)
    resumed = trainer_of(other_model, tmp_path, optimizers=constant(other))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert other.metrics()["steps"] == 4
    kit.assert_same(kit.parameters_of(other_model), kit.parameters_of(model))
    kit.assert_same(other.state_dict()["state"], optimizer.state_dict()["state"])


def test_i05_a_class_and_its_options_take_names_and_source(tmp_path: Path) -> None:
    """Trainer passes its own groups, with decayed parameters first. Names map them to the source's tables."""
    model = adapted()
    options = {"alignment": Alignment(source_of(model)), "names": lora_parameters(model)}
    trainer = trainer_of(model, tmp_path, optimizer_cls_and_kwargs=(guided(torch.optim.AdamW, **options), {"lr": 1e-2}))
    trainer.train()
    optimizer = unwrap(trainer.optimizer)
    assert optimizer is not None
    assert optimizer.metrics()["steps"] == 4
    assert optimizer.metrics()["source_cosine"] != 0


def test_i05_trl_sft_trainer_takes_a_gradguide(tmp_path: Path) -> None:
    """The result equals that of Trainer on the same rows."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, 40)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    rows = [" ".join(f"w{int(token)}" for token in row["input_ids"]) for row in texts(seed=0)]
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_grad_norm=0.0,
        bf16=False,
        gradient_checkpointing=False,
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    model = adapted()
    optimizer = guide(model, source_of(model))
    before = kit.parameters_of(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": rows}),
        processing_class=tokenizer,
        optimizers=constant(optimizer),
    )
    trainer.train()
    assert unwrap(trainer.optimizer) is optimizer
    assert optimizer.metrics()["steps"] == trainer.state.global_step == 4
    assert optimizer.metrics()["source_cosine"] != 0
    assert kit.differ(kit.parameters_of(model), before)
