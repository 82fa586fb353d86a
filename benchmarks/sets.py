"""Sets of parameter shapes on which steps are timed, from thousands of tiny tensors to whole models."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["LLAMAS", "SETS", "Llama", "Set"]

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


@dataclass(frozen=True, slots=True)
class Llama:
    """Sizes of a Llama: number of layers, widths of the stream, the MLP, and keys and values, and attention heads."""

    layers: int
    hidden: int
    inner: int
    kv: int
    vocabulary: int
    heads: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of the linear layers, without the output layer."""
        layer = [
            (self.hidden, self.hidden),
            (self.hidden, self.kv),
            (self.hidden, self.kv),
            (self.hidden, self.hidden),
            (self.hidden, self.inner),
            (self.hidden, self.inner),
            (self.inner, self.hidden),
        ]
        return layer * self.layers

    @property
    def shapes(self) -> list[Shape]:
        """Return the shapes of all parameters: embedding, linear layers, norms, output layer."""
        ends: Shape = (self.vocabulary, self.hidden)
        weights: list[Shape] = [(outs, ins) for ins, outs in self.linears]
        return [ends, *weights, *([(self.hidden,)] * (2 * self.layers + 1)), ends]


LLAMAS = {
    "0.1B": Llama(layers=30, hidden=576, inner=1536, kv=192, vocabulary=49152, heads=9),
    "1.1B": Llama(layers=22, hidden=2048, inner=5632, kv=256, vocabulary=32000, heads=32),
    "8B": Llama(layers=32, hidden=4096, inner=14336, kv=1024, vocabulary=128256, heads=32),
    "70B": Llama(layers=80, hidden=8192, inner=28672, kv=1024, vocabulary=128256, heads=64),
}


def lora(linears: list[tuple[int, int]], rank: int) -> list[Shape]:
    """Return the shapes of LoRA's two matrices on each linear layer."""
    return [shape for ins, outs in linears for shape in ((rank, ins), (outs, rank))]


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


_1B, _8B, _70B = (LLAMAS[size].linears for size in ("1.1B", "8B", "70B"))

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
        Set("all of a 1.1B Llama", LLAMAS["1.1B"].shapes, whole=True),
    )
}
