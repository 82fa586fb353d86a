"""LoRA parameters of a PEFT model, by name and by layer."""

from __future__ import annotations

from torch import Tensor, nn

from gradguide.naming import canonical, module_of

__all__ = ["lora_parameters", "lora_scopes"]


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of every trainable LoRA parameter, in the model's order; fit for ``GradGuide(..., names=...)``.

    Adapters that are frozen or not active take no part; call it again after adding or unfreezing one.

    Raises:
        ValueError: there is none.
    """
    found = [(canonical(name), p) for name, p in model.named_parameters() if "lora_" in name and p.requires_grad]
    if not found:
        raise ValueError(
            "the model has no trainable LoRA parameter: add an adapter with peft.get_peft_model, or unfreeze one with "
            "model.set_adapter(name)"
        )
    return found


def lora_scopes(model: nn.Module) -> dict[Tensor, str]:
    """Label of every trainable LoRA parameter: A and B of one layer share one. For ``GradGuide(..., scope=...)``.

    Raises:
        ValueError: there is none.
    """
    return {parameter: module_of(name) for name, parameter in lora_parameters(model)}
