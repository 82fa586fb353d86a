"""Sets of parameter shapes on which steps are timed, from thousands of tiny tensors to whole models."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["SETS", "Set"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Set:
    """Named shapes.

    whole: whether the set is so large that only two optimizers fit on a device at a time.
    """

    name: str
    shapes: list[Shape]
    whole: bool = False

    @property
    def elements(self) -> int:
        """Return the number of parameters."""
        return sum(map(math.prod, self.shapes))


def llama_linears(layers: int, hidden: int, inner: int, kv: int) -> list[tuple[int, int]]:
    """Return (inputs, outputs) of the linear layers of a Llama, without the output layer."""
    layer = [
        (hidden, hidden),
        (hidden, kv),
        (hidden, kv),
        (hidden, hidden),
        (hidden, inner),
        (hidden, inner),
        (inner, hidden),
    ]
    return layer * layers


def lora(linears: list[tuple[int, int]], rank: int) -> list[Shape]:
    """Return the shapes of LoRA's two matrices on each linear layer."""
    return [shape for ins, outs in linears for shape in ((rank, ins), (outs, rank))]


def llama(linears: list[tuple[int, int]], layers: int, hidden: int, vocabulary: int) -> list[Shape]:
    """Return the shapes of all parameters of a Llama: embedding, linear layers, norms, output layer."""
    weights: list[Shape] = [(outs, ins) for ins, outs in linears]
    return [(vocabulary, hidden), *weights, *([(hidden,)] * (2 * layers + 1)), (vocabulary, hidden)]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> list[Shape]:
    """Return the shapes of all parameters of GPT-2, whose output layer is the embedding."""
    layer: list[Shape] = [
        *[(width,)] * 4,
        (width, 3 * width),
        (3 * width,),
        (width, width),
        (width,),
        (width, 4 * width),
        (4 * width,),
        (4 * width, width),
        (width,),
    ]
    return [(vocabulary, width), (context, width), *layer * layers, (width,), (width,)]


_1B = llama_linears(layers=22, hidden=2048, inner=5632, kv=256)
_8B = llama_linears(layers=32, hidden=4096, inner=14336, kv=1024)
_70B = llama_linears(layers=80, hidden=8192, inner=28672, kv=1024)

SETS = {
    chosen.name: chosen
    for chosen in (
        Set("LoRA r16 of a 1.1B Llama", lora(_1B, 16)),
        Set("LoRA r64 of a 1.1B Llama", lora(_1B, 64)),
        Set("LoRA r16 of an 8B Llama", lora(_8B, 16)),
        Set("LoRA r64 of an 8B Llama", lora(_8B, 64)),
        Set("LoRA r16 of a 70B Llama", lora(_70B, 16)),
        Set("LoRA r64 of a 70B Llama", lora(_70B, 64), whole=True),
        Set("10,000 tiny tensors", [(8, 8)] * 10_000),
        Set("all of a 124M GPT-2", gpt2()),
        Set("all of a 1.1B Llama", llama(_1B, 22, 2048, 32000), whole=True),
    )
}
