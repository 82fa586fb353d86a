"""Name linear layers of quantisers that a structured source cannot take, such as those of GPTQ, AWQ and HQQ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gradguide.utils.names import model_modules

__all__ = ["packed_note"]


def packed_note(model: nn.Module) -> str:
    """Return a sentence for errors about layers that were not found; "" if the model has no packed ones."""
    found = [(name, type(module).__name__) for name, module in model_modules(model) if _is_packed(module)]
    if not found:
        return ""
    name, kind = found[0]
    return (
        f". {len(found)} linear layers are packed by a quantiser such as GPTQ, AWQ or HQQ, and no nn.Linear (first: "
        f"{name}, a {kind}), so structured sources leave them out. Quantise with bitsandbytes or torchao, whose layers "
        "are nn.Linear, or use SourceGradient.anchored()"
    )


def _is_packed(module: nn.Module) -> bool:
    """Return whether a module has the sizes of a linear layer, holds integers, and has no floating-point weight."""
    weight = getattr(module, "weight", None)
    sized = any(isinstance(getattr(module, size, None), int) for size in ("in_features", "infeatures"))
    plain = isinstance(weight, Tensor) and weight.is_floating_point()
    if not sized or plain or isinstance(module, nn.Linear) or any(True for _ in module.children()):
        return False
    # Layers of users may name a floating-point weight otherwise.
    held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(not (each.is_floating_point() or each.is_complex() or each.dtype == torch.bool) for each in held)
