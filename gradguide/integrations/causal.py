"""Load causal language models of transformers."""

from __future__ import annotations

from typing import Any

__all__ = ["check_causal", "load_causal"]


def load_causal(name: str) -> Any:
    """Load a causal language model in the dtype that it is stored in, from a folder or hub id.

    Raises:
        OSError, ValueError: the model cannot be read, it has no weights for some parameters, or transformers has no
            causal language model for its configuration.
    """
    import transformers

    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    stored = {"dtype" if version >= (4, 56) else "torch_dtype": "auto"}
    try:
        network, info = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **stored)
    except ValueError as error:
        first, found, _ = str(error).partition(" for this kind of AutoModel")
        if not found:
            raise
        # The rest of the message lists all configurations.
        raise ValueError(
            f"{name!r} cannot be loaded by AutoModelForCausalLM ({first}): load it with its own class, and call "
            "gradguide.StructuredSource.capture"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name!r} has no weights for {len(missing)} parameters of {type(network).__name__}, such as {missing[0]}: "
            "it is not a causal language model, or it is damaged"
        )
    return network


def check_causal(network: Any) -> None:
    """Raise ValueError if a language model's prediction after a token depends on the tokens that follow.

    transformers loads masked models as causal ones, and gives them attention in both directions.
    """
    import torch

    size = network.get_input_embeddings().num_embeddings
    ids = torch.arange(32, device=network.device).view(2, 16) * 97 % size
    ids[:, 0] = 0
    with torch.no_grad():
        first, second = network(input_ids=ids).logits[:, 0].float()
    # Half precision may round the same predictions in another way.
    if float((first - second).std()) > 0.05 * float(first.std()):
        raise ValueError(
            f"the predictions of {type(network).__name__} depend on the tokens that follow, as in a masked model: "
            "gradguide capture needs a causal language model. Call gradguide.StructuredSource.capture for others"
        )
