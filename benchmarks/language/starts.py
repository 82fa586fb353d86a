"""Methods that choose where the adapter starts. The changed model is the base model at the start of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.language.model import TRAINED, Language
from benchmarks.language.training import Setup, Training

__all__ = ["corda", "corda_eigens", "lora_null", "null", "unused_directions"]

_UNUSED = 64
_WRAPPED = r".*\.base_layer"


def null(setup: Setup) -> Training:
    """Train B alone, with A in the space that source inputs hardly use (the idea of LoRA-Null, arXiv 2503.02659)."""
    setup.model.start_in(setup.sources.unused())
    setup.model.freeze_a()
    return setup.clipped()


def lora_null(setup: Setup) -> Training:
    """Start from the part of W that acts on inputs outside the source's (LoRA-Null, arXiv 2503.02659), then clip.

    W N = U S V^T, where N projects onto the 64 directions that source inputs use least. B A is its leading part of
    rank r, and W loses it. Option ``train``: "both", or "b" for B alone, as LoRA-Null-v2.
    """
    model, directions = setup.model, setup.sources.unused()
    start = {}
    for name, layer in model.layers():
        weight = layer.base_layer.weight.detach().float()
        unused = directions[name]
        left, values, right = torch.linalg.svd(weight @ unused, full_matrices=False)
        start[name] = left, values, unused @ right.mT
    _split(model, start)
    if setup.method.options["train"] == "b":
        model.freeze_a()
    return setup.clipped()


def corda(setup: Setup) -> Training:
    """Start from the least singular directions of W times the inputs' covariance (CorDA, arXiv 2406.05223), then clip.

    The covariance is that of source text, the mode "knowledge-preserving". PEFT computes the directions
    (``preprocess_corda``) and sets up the adapter (``corda_init``).
    """
    from peft.tuners.lora.corda import CordaEigens

    model, eigens = setup.model, setup.sources.corda()
    for name, layer in model.layers():
        u, s, v = (eigens[f"{name}.{part}"].to(model.device) for part in "usv")
        with _storage_kept(model, layer):
            layer.base_layer.eigens = CordaEigens(S_WC=s.clone(), U_WC=u, V_WC=v)
            layer.corda_init("default", "corda")
    return setup.clipped()


@torch.no_grad()
def unused_directions(model: Language, batches: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the eigenvectors of the least eigenvalues of E[x x^T], [in, 64], by layer; on the CPU.

    x are the inputs of a layer on source text. Of layers with up to 64 inputs, all directions but the most used one.
    """
    sums: dict[str, Tensor] = {}
    leaders: dict[str, str] = {}  # the first of the layers that have the same input
    seen: dict[int, tuple[str, Tensor]] = {}
    mask = torch.ones(0)

    def add(name: str, x: Tensor) -> None:
        leaders[name] = seen.setdefault(id(x), (name, x))[0]
        if leaders[name] == name:
            rows = x[mask.bool()].float()
            sums[name] = sums.get(name, torch.zeros((), device=x.device)) + rows.mT @ rows

    def hook(name: str) -> Any:
        return lambda _, arguments: add(name, arguments[0])

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in model.layers()]
    for batch in batches:
        seen.clear()
        mask = batch["attention_mask"]
        model.hidden(batch["input_ids"])
    for handle in handles:
        handle.remove()
    found = {}
    for name, moments in sums.items():
        size = min(_UNUSED, len(moments) - 1)
        found[name] = torch.linalg.eigh(moments.double())[1][:, :size].float().cpu().contiguous()
    return {name: found[leader].clone() for name, leader in leaders.items()}


def corda_eigens(model: Language, texts: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return the r least singular vectors and values of each layer, by layer and part: u, s, v; on the CPU.

    Args:
        texts: sequences of source text, int64 [tokens].
    """
    from peft import LoraConfig
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    rank = model.factors(next(model.layers())[1])[0].shape[0]
    config = LoraConfig(
        r=rank,
        init_lora_weights="corda",
        target_modules=_WRAPPED,
        corda_config=CordaConfig(corda_method="kpm", verbose=False),
    )

    def run() -> None:
        for text in texts:  # PEFT's hook takes one sequence at a time
            model.hidden(text[None].to(model.device))

    preprocess_corda(model.model, config, run_model=run)
    found: dict[str, Tensor] = {}
    for name, layer in model.layers():
        eigens = layer.base_layer.eigens
        parts = {"u": eigens.U_WC, "s": eigens.S_WC, "v": eigens.V_WC}
        found |= {f"{name}.{part}": value.float().cpu().contiguous() for part, value in parts.items()}
        del layer.base_layer.eigens
    return found


@torch.no_grad()
def _split(model: Language, start: Mapping[str, tuple[Tensor, Tensor, Tensor]]) -> None:
    """Move the leading part U S V^T of rank r of each layer from its weight into its adapter."""
    for name, layer in model.layers():
        left, values, right = start[name]
        with _storage_kept(model, layer):
            a, b = model.factors(layer)
            root = (values[: len(a)] / model.scale).sqrt()
            a.copy_((right[:, : len(a)] * root).mT)
            b.copy_(left[:, : len(a)] * root)
            weight = layer.base_layer.weight
            weight.copy_((weight.float() - model.scale * b @ a).to(weight.dtype))


@contextmanager
def _storage_kept(model: Language, layer: Any) -> Iterator[None]:
    """Keep the storage of A, B and W, which graphs and optimizers refer to, and undo the change of W at a reset.

    Raises:
        ValueError: the adapter is not fresh; the new A and B would replace what it has learnt.
    """
    if bool(model.factors(layer)[1].any()):
        raise ValueError(TRAINED)
    weight = layer.base_layer.weight
    before = weight.detach().clone()
    held = [(p, p.data) for p in (*model.factors(layer), weight)]
    model.until_reset(lambda: weight.data.copy_(before))
    yield
    for p, storage in held:
        storage.copy_(p.data)
        p.data = storage
