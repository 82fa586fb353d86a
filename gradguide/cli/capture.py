"""``gradguide capture``: make the file of a structured source from a causal language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradguide.utils.atomic import scratch_beside

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["capture"]

_OWN_TEXT = 16384
"""Tokens that the model writes if no text is given."""
_SEED = 0


def capture(
    model: str,
    out: Path,
    *,
    text: Path | None = None,
    own_text: int | None = None,
    rank: int = 64,
    modules: Sequence[str] | None = None,
    dtype: str = "float32",
    batch_size: int = 8,
    length: int = 96,
) -> dict[str, Any]:
    """Load a model, capture a structured source on text, and write its file.

    Args:
        model: folder or hub id of a causal language model. It runs on the CUDA device if there is one.
        out: file to write; atomic.
        text: UTF-8 file with one paragraph on each line.
        own_text: number of tokens that the model writes itself, if ``text`` is None.
        modules, rank: see ``StructuredSource.capture``.
        dtype: "float32" or "bfloat16", the storage of the factors.
        batch_size, length: sequences per batch, and the largest number of tokens in a sequence.

    Returns:
        JSON types: ``out``, ``layers``, ``tokens``, ``loss`` (mean, in nats).

    Raises:
        ImportError: transformers is not installed.
        OSError, ValueError: the model or the text cannot be read, the text is too short, or the file cannot be written.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError('gradguide capture needs transformers: pip install "gradguide[hf]"') from error
    import torch

    from gradguide.integrations.causal import check_causal, load_causal
    from gradguide.integrations.sampling import begins_with_bos, check_length, sampled_loss
    from gradguide.integrations.sampling import own_text as write_text
    from gradguide.sources.structured import StructuredSource

    paragraphs = None if text is None else _paragraphs(text)
    if out.is_dir():
        raise IsADirectoryError(f"{str(out)!r} is a folder, expected a file")
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = load_causal(model).to("cuda" if torch.cuda.is_available() else "cpu")
    check_length(network, length)
    check_causal(network)
    with scratch_beside(out):
        pass  # raises before the work if the folder cannot be written
    batches: list[dict[str, Tensor]]
    if paragraphs is None:
        count = _OWN_TEXT if own_text is None else own_text
        batches = write_text(network, tokenizer, tokens=count, seed=_SEED, length=length, batch_size=batch_size)
    else:
        head = [tokenizer.bos_token_id] if begins_with_bos(tokenizer) else []
        windows = [window for paragraph in paragraphs for window in _windows(tokenizer, paragraph, head, length)]
        if not windows:
            raise ValueError(f"{str(text)!r} has no paragraph of at least 2 tokens")
        starts = range(0, len(windows), batch_size)
        batches = [_batch(windows[start : start + batch_size], network.device) for start in starts]
    torch.manual_seed(_SEED)
    source = StructuredSource.capture(
        network, batches, sampled_loss, modules=modules, rank=rank, dtype=getattr(torch, dtype)
    )
    source.metadata["text"] = "written by the model" if text is None else text.name
    source.save(out)
    totals = source.metadata
    return {"out": str(out), "layers": len(source.names()), "tokens": totals["tokens"], "loss": totals["loss"]}


def _paragraphs(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not a text in UTF-8 ({error})") from error
    found = [line for line in lines if line.strip()]
    if not found:
        raise ValueError(f"{str(path)!r} has no text")
    return found


def _windows(tokenizer: Any, paragraph: str, head: list[int], length: int) -> list[list[int]]:
    """Return the tokens of a paragraph in parts of at most ``length``, each after ``head``.

    A part of one token predicts nothing, and is left out.
    """
    ids = list(tokenizer(paragraph, add_special_tokens=False)["input_ids"])
    step = length - len(head)
    parts = [head + ids[start : start + step] for start in range(0, len(ids), step)]
    return [part for part in parts if len(part) > 1]


def _batch(windows: list[list[int]], device: Any) -> dict[str, Tensor]:
    """Return token ids and attention mask, int64 [windows, tokens], padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.tensor(window) for window in windows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True).to(device),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(device),
    }
