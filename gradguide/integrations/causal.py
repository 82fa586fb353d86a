"""Load causal language models of transformers."""

from __future__ import annotations

from typing import Any

__all__ = ["load_causal"]


def load_causal(name: str) -> Any:
    """Load a causal language model in the dtype that it is stored in, from a folder or hub id.

    Raises:
        OSError, ValueError: the model cannot be read, or it has no weights for some parameters.
    """
    import transformers

    version = tuple(map(int, transformers.__version__.split(".")[:2]))
    stored = {"dtype" if version >= (4, 56) else "torch_dtype": "auto"}
    network, info = transformers.AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **stored)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name!r} has no weights for {len(missing)} parameters of {type(network).__name__}, such as {missing[0]}: "
            "it is not a causal language model, or it is damaged"
        )
    return network
