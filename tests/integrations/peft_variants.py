"""PEFT's methods on a tiny random language model, and what works with each: the table of tests/contract/README.md.

``test_peft_variants.py`` checks every cell. ``python -m tests.integrations.peft_variants`` prints the table.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from torch import nn
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from tests.sources.structured.problems import VOCABULARY, llama, text

__all__ = ["DEFAULT", "MESSAGES", "VARIANTS", "WORKS", "Variant", "four_bit", "table"]

TARGETS = ["q_proj", "v_proj", "down_proj"]
WORKS = "works"
NO_LAYER = "refused: no layer"
OTHER_WEIGHT = "refused: start"
OTHER_CHANGE = "refused: form"
MESSAGES = {
    NO_LAYER: "no trained parameter of the model changes one of the source's",
    OTHER_WEIGHT: r"is not the weight at capture: .*the adapter's start changed it .*Capture a source with this model",
    OTHER_CHANGE: r"adapter.*SourceGradient.anchored\(\)",
}
"""Part of the message of each refusal."""


@dataclass(frozen=True)
class Variant:
    """A method, and what a structured source does with it. Rules and a stored source work with every method.

    make: returns the model with its adapter, equal at each call.
    base_source: the outcome with a structured source of the base model.
    own_source: the outcome with a structured source of the model with its adapter.
    optimizer: returns the optimizer to guide.
    plain: returns the base model.
    note: more about the outcomes.
    """

    make: Callable[[], nn.Module]
    base_source: str = WORKS
    own_source: str = WORKS
    note: str = ""
    optimizer: Callable[[nn.Module], Optimizer] = field(default=lambda model: AdamW(model.parameters(), lr=1e-2))
    plain: Callable[[], nn.Module] = field(default=lambda: llama(1))


def seeded(config: Any, model: nn.Module | None = None) -> nn.Module:
    torch.manual_seed(0)
    found: nn.Module = peft.get_peft_model(llama(1) if model is None else model, config)
    return found


def lora(**options: Any) -> Callable[[], nn.Module]:
    given = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return lambda: seeded(peft.LoraConfig(**given))


def other(kind: str, **options: Any) -> Variant:
    given = {"target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return Variant(lambda: seeded(getattr(peft, kind)(**given)), OTHER_CHANGE, OTHER_CHANGE)


def prompt(kind: str, **options: Any) -> Variant:
    given = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM", **options}
    return Variant(lambda: seeded(getattr(peft, kind)(**given)), NO_LAYER, NO_LAYER)


def corda() -> nn.Module:
    model = llama(1)
    config = peft.LoraConfig(r=2, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig())

    def run() -> None:
        with torch.no_grad():
            for batch in text(4, rows=1):
                model(**batch)

    preprocess_corda(model, config, run_model=run)
    return seeded(config, model)


def two(mixed: bool = False) -> nn.Module:
    """Return a model with two active adapters on one layer, the second of another kind if ``mixed``."""
    torch.manual_seed(0)
    first = peft.LoraConfig(r=2, target_modules=TARGETS)
    model: Any = peft.get_peft_model(llama(1), first, mixed=mixed)
    kind = peft.LoHaConfig if mixed else peft.LoraConfig
    model.add_adapter("second", kind(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "second"])
    assert isinstance(model, nn.Module)
    return model


def four_bit() -> nn.Module:
    """Return a base model whose layers bitsandbytes packs into 4 bits. A CPU needs multiples of 32 outputs."""
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model: nn.Module = LlamaForCausalLM(config)
    for layer in [module for name, module in model.named_modules() if name.endswith(("self_attn", "mlp"))]:
        for name, linear in list(layer.named_children()):
            if isinstance(linear, nn.Linear):
                packed = bnb.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
                packed.weight = bnb.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
                setattr(layer, name, packed.to("cpu"))
    return model


VARIANTS: dict[str, Variant] = {
    "LoRA": Variant(lora()),
    "rsLoRA": Variant(lora(use_rslora=True)),
    "LoRA+": Variant(
        lora(), optimizer=lambda model: create_loraplus_optimizer(model, AdamW, lr=1e-2, loraplus_lr_ratio=4.0)
    ),
    "LoRA-FA": Variant(
        lora(), optimizer=lambda model: create_lorafa_optimizer(model, r=2, lora_alpha=4, lr=1e-2), note="A is frozen"
    ),
    "PiSSA": Variant(lora(init_lora_weights="pissa"), OTHER_WEIGHT),
    "OLoRA": Variant(lora(init_lora_weights="olora"), OTHER_WEIGHT),
    "CorDA": Variant(corda, OTHER_WEIGHT),
    "LoRA with a bias of B": Variant(lora(lora_bias=True), note="the bias has no pull"),
    "LoRA on embeddings too": Variant(
        lora(target_modules=["q_proj", "embed_tokens"]), note="the embedding has no structured pull; a warning says so"
    ),
    "LoRA, trainable tokens": Variant(lora(trainable_token_indices=[1, 2]), note="the tokens have no structured pull"),
    "LoRA, `modules_to_save` of the head": Variant(
        lora(modules_to_save=["lm_head"]), note="a head outside the source has no pull"
    ),
    "LoRA, `modules_to_save` of a layer": Variant(lora(target_modules=["q_proj"], modules_to_save=["down_proj"])),
    "LoRA, `target_parameters`": Variant(
        lora(target_modules=[], target_parameters=["q_proj.weight"]),
        note="experts of one tensor have no structured pull; a warning says so",
    ),
    "two LoRA adapters": Variant(two),
    "LoRA, 4-bit base (bitsandbytes)": Variant(
        lambda: seeded(peft.LoraConfig(r=2, target_modules="all-linear"), four_bit()), plain=four_bit,
        note="the packed weight is not compared with that at capture",
    ),
    "DoRA": Variant(lora(use_dora=True), OTHER_CHANGE, OTHER_CHANGE),
    "LoRA and LoHa mixed": Variant(lambda: two(mixed=True), OTHER_CHANGE, OTHER_CHANGE),
    "AdaLoRA": other("AdaLoraConfig", init_r=3, total_step=20),
    "VeRA": other("VeraConfig", r=2, target_modules=["q_proj"]),
    "LoHa": other("LoHaConfig", r=2),
    "LoKr": other("LoKrConfig", r=2),
    "OFT": other("OFTConfig", oft_block_size=4),
    "BOFT": other("BOFTConfig", boft_block_size=4),
    "HRA": other("HRAConfig", r=2),
    "OSF": other("OSFConfig", effective_rank=4),
    "IA3": other("IA3Config", feedforward_modules=["down_proj"]),
    "prompt tuning": prompt("PromptTuningConfig"),
    "P-tuning": Variant(
        lambda: seeded(peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=8)),
        NO_LAYER, note="captured with the adapter, the source is of the layers of the prompt's encoder",
    ),
    "prefix tuning": prompt("PrefixTuningConfig"),
    "trainable tokens": Variant(
        lambda: seeded(peft.TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"])),
        NO_LAYER, NO_LAYER,
    ),
    "layer norms": Variant(
        lambda: seeded(peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"])),
        NO_LAYER, NO_LAYER,
    ),
}  # fmt: skip


DEFAULT = ("LoRA", "PiSSA", "LoRA with a bias of B", "LoRA, 4-bit base (bitsandbytes)", "LoRA and LoHa mixed")
"""Checked by the default suite; the others by the slow one."""


def table() -> str:
    """Return the table of tests/contract/README.md."""
    head = [
        "method",
        "rules, stored source",
        "structured source of the base model",
        "captured with the adapter",
        "note",
    ]
    rows = [head, ["---"] * len(head)]
    for name, variant in VARIANTS.items():
        rows.append([name, WORKS, variant.base_source, variant.own_source, variant.note])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(table())
