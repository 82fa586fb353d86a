"""Compare Kronecker approximations of the curvature with measured KL: ``python -m benchmarks.language.curvature``.

An adapter is trained for a few steps, and one layer's part of it is kept at a time. Its KL from the base model is
measured on held-out text, and modelled by several approximations from the same source text:

- ``exact``: the mean square of the products of the layer's change with the gradients of whole sequences. It differs
  from the measured KL by the sampling of text and labels only.
- ``tokens``: E[x x^T] and E[d d^T] over tokens (KFAC-expand). Tokens count as independent.
- ``sequences``: the same of the mean input and the summed gradient of a sequence (KFAC-reduce, arXiv 2311.00636).
- ``both``: tokens, with inputs centered per sequence, plus sequences.
- ``weighted``: both, where the inputs are weighted by the squared gradients and the gradients by the squared inputs.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness import Result, save, summarise, versions
from benchmarks.language.data import Texts, padded
from benchmarks.language.measures import Drift, Size
from benchmarks.language.model import Language, answer_loss
from benchmarks.language.run import device_of
from gradguide.demo.data import batches as shuffled
from gradguide.integrations.sampling import sampled_loss

RESULTS = Path(__file__).parent.parent / "results" / "language-curvature.csv"
PROJECTIONS = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
_SCALE = 2.0  # alpha / r of the suite's adapter


class Moments:
    """Sums over pairs of an input x and a gradient d, plain and weighted by the squared length of the other."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add pairs: x [..., in] and d [..., out]."""
        x, d = x.flatten(0, -2), d.flatten(0, -2)
        x2, d2 = x.square().sum(-1, keepdim=True), d.square().sum(-1, keepdim=True)
        self.count += len(x)
        for name, value in {
            "S": x.T @ x, "G": d.T @ d, "weighted S": (x * d2).T @ x, "weighted G": (d * x2).T @ d,
            "products": (x2 * d2).sum(),
        }.items():  # fmt: skip
            self.sums[name] = self.sums[name] + value

    def kl(self, b: Tensor, a: Tensor, *, weighted: bool) -> float:
        """Return 1/2 tr(D^T G D S) for D = b @ a, summed over the pairs."""
        kind = "weighted " if weighted else ""
        norm = float(self.sums["products"]) if weighted else self.count
        if norm == 0:
            return 0.0
        inner = (b.T @ self.sums[f"{kind}G"] @ b) * (a @ self.sums[f"{kind}S"] @ a.T)
        return float(0.5 * inner.sum() / norm)


class Probe:
    """A layer's change, and the statistics that model its KL."""

    def __init__(self, layer: Any) -> None:
        self.a = layer.lora_A["default"].weight.detach().clone()
        self.b = layer.lora_B["default"].weight.detach() * _SCALE
        self.tokens, self.centered, self.sequences = Moments(), Moments(), Moments()
        self.squares = 0.0

    def add(self, x: Tensor, d: Tensor) -> None:
        """Add inputs [rows, tokens, in] and gradients of the summed log likelihood [rows, tokens, out]."""
        mean, total = x.mean(1), d.sum(1)
        self.tokens.add(x, d)
        self.centered.add(x - mean[:, None], d)
        self.sequences.add(mean, total)
        self.squares += float(((d @ self.b) * (x @ self.a.T)).sum((1, 2)).square().sum())

    def modelled(self, predictions: int) -> dict[str, float]:
        """Return KL in nats per token by kind of approximation."""
        tokens, centered, sequences = (
            [part.kl(self.b, self.a, weighted=weighted) / predictions for weighted in (False, True)]
            for part in (self.tokens, self.centered, self.sequences)
        )
        return {
            "exact": 0.5 * self.squares / predictions,
            "tokens": tokens[0],
            "sequences": sequences[0],
            "both": centered[0] + sequences[0],
            "weighted": centered[1] + sequences[1],
        }


def train(model: Language, texts: Texts, steps: int) -> None:
    """Train the adapter on banking77 with clipping and AdamW at 1e-3."""
    target = texts.target("banking77", 8, 0)
    model.reset(0)
    optimizer = torch.optim.AdamW(model.parameters, lr=1e-3, weight_decay=0.0)
    order = shuffled(len(target.train), 8, 0)
    for _ in range(steps):
        optimizer.zero_grad()
        answer_loss(model, padded([target.pair(i) for i in next(order)]).to(model.device), "token").backward()
        nn.utils.clip_grad_norm_(model.parameters, 1.0)
        optimizer.step()


def observe(model: Language, probes: dict[str, Probe], windows: Tensor) -> int:
    """Add the statistics of source text under labels drawn from the base model. Return the number of predictions."""
    layers = dict(model.layers())
    inputs: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs[name] = arguments[0].detach().float()
            output = output if output.requires_grad else output.detach().requires_grad_()
            output.register_hook(lambda gradient: found.__setitem__(name, gradient.float()))
            return output

        return keep

    embedding = model.model.get_input_embeddings()
    handles = [embedding.register_forward_hook(lambda *args: args[2].detach().requires_grad_())]
    handles += [layers[name].base_layer.register_forward_hook(hook(name)) for name in probes]
    predictions = 0
    for ids in windows.split(4):
        with model.model.disable_adapter():
            loss, count = sampled_loss(model.model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        loss.backward()
        predictions += count
        for name, probe in probes.items():
            probe.add(inputs[name], found[name] * count)
    for handle in handles:
        handle.remove()
    return predictions


def measure(model: Language, texts: Texts, *, steps: int, count: int) -> list[Result]:
    """Return measured KL per layer, and the modelled KL over it."""
    model.reset(0)
    drift = Drift(model, texts, Size(rows=0, windows=8, answers=1, batch=8))
    train(model, texts, steps)
    layers = dict(model.layers())
    depth = model.model.config.num_hidden_layers
    chosen = [f"layers.{place}." for place in (depth // 10, depth // 2, depth - 2)]
    probes = {
        name: Probe(layer)
        for name, layer in layers.items()
        if any(part in name for part in chosen) and name.endswith(PROJECTIONS)
    }
    torch.manual_seed(1)
    predictions = observe(model, probes, texts.windows("capture", count).to(model.device))
    results = []
    for name, probe in probes.items():
        with torch.no_grad():
            for other, layer in layers.items():
                weight = layer.lora_B["default"].weight
                weight.copy_(probe.b / _SCALE if other == name else torch.zeros_like(weight))
        kl = drift()["drift"]
        results.append(summarise(name, "measured", "KL", "nats per token", [kl]))
        for kind, value in probe.modelled(predictions).items():
            results.append(summarise(name, kind, "modelled KL / measured", "ratio", [value / kl]))
    return results


def main(argv: list[str] | None = None) -> int:
    from transformers import AutoTokenizer

    parser = argparse.ArgumentParser(prog="python -m benchmarks.language.curvature", description=__doc__)
    parser.add_argument("--model", required=True, help="folder or hub id of a causal language model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the text sets")
    parser.add_argument("--steps", type=int, default=6, help="training steps (default: %(default)s)")
    parser.add_argument("--windows", type=int, default=48, help="windows of source text (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="result file (default: %(default)s)")
    options = parser.parse_args(argv)
    tokenizer: Any = AutoTokenizer.from_pretrained(options.model)
    texts = Texts(options.data, tokenizer)
    results = measure(Language(options.model, device_of()), texts, steps=options.steps, count=options.windows)
    save(options.out, results, versions())
    for result in results:
        print(f"{result.benchmark:45} {result.provider:10} {result.value:12.3g} {result.unit}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
