"""OSF (orthogonal subspace fine-tuning, arXiv 2504.07097, in PEFT): train the least singular directions of each W."""

from __future__ import annotations

from copy import deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.language.model import Language
from benchmarks.language.training import Setup, Training

__all__ = ["osf"]

_NAME = "default"


def osf(setup: Setup) -> Training:
    """Train U, S and V of the least singular directions of each W instead of A and B, then clip.

    The strength is the share of directions that stay as they are. PEFT keeps updates of U and V orthogonal to them.
    """
    model, share = setup.model, setup.method.strength
    parameters = [p for layer in _attach(model, share) for p in layer.osf_svd_params[_NAME].values()]
    model.replace(parameters, f"osf {share}")
    return setup.clipped()


@torch.no_grad()
def _attach(model: Language, share: float) -> list[Any]:
    """Put PEFT's layer of OSF in the place of each base layer until the next reset, and return the layers.

    They are made once, because CUDA graphs refer to their storage, and start anew each time.

    Raises:
        ValueError: they are there already, with what an earlier task of the run taught them.
    """
    if model.variant.startswith("osf"):
        raise ValueError(
            "osf starts from the base model, so it learns one task per run: use scenario fresh or transfer"
        )
    made = model.kept.setdefault(("osf", share), {})
    for name, layer in model.layers():
        base = layer.base_layer
        if name not in made:
            made[name] = _make(base, share)
        layer.base_layer = made[name]
        model.until_reset(partial(setattr, layer, "base_layer", base))
        for part, p in made[name].osf_svd_params[_NAME].items():
            p.copy_(getattr(made[name], f"_osf_{part}_init")[_NAME])
    return list(made.values())


def _make(base: nn.Linear, share: float) -> Any:
    from peft import OSFConfig
    from peft.tuners.osf.layer import Linear

    rank = max(1, round(share * min(base.weight.shape)))
    # From a copy in float32: the base layer itself keeps its dtype.
    made = Linear(deepcopy(base).float(), _NAME, OSFConfig(), effective_rank=rank).eval()
    made.base_layer = base
    return made
