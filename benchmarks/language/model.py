"""A causal language model with a LoRA adapter that is made anew for each run, and the gradient of losses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.language.data import Batch
from gradguide.demo.model import add_lora
from gradguide.integrations.peft import lora_parameters

__all__ = ["TRAINED", "Gradient", "Language", "answer_loss", "grads", "kl", "states_at", "token_loss"]

TRAINED = "the method chooses the start of a fresh adapter, found one that has learnt a task: use scenario fresh"
_CHUNK = 1024  # positions whose logits are in memory at once
_ADAPTER = "default"


class Language:
    """A causal language model, loaded once, with a float32 LoRA adapter (rank 8, alpha 16) on all linear layers.

    The model stays in eval mode: nothing is dropped, so runs differ only in their seed.

    Args:
        folder: a Hugging Face folder or hub id. Its logits must be the output embedding of the last hidden state.
        device: on CUDA the base model is in bfloat16, elsewhere in float32.

    Raises:
        ValueError: the logits are computed otherwise.
    """

    def __init__(self, folder: str | Path, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        self.device = device
        self._dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.variant = ""
        """Names what a method has added to the model: part of the key of every loss."""
        self.kept: dict[object, Any] = {}
        """Objects that methods create once per model, by key."""
        self._replaced: list[nn.Parameter] = []
        self._masks: dict[int, Tensor] = {}
        self._undo: list[Callable[[], None]] = []
        base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=self._dtype).to(device)
        self.model: Any = add_lora(base)
        self.model.eval()
        self._decoder: Any = base.get_decoder()
        self._embedding: Any = base.get_output_embeddings()
        self.named = list(lora_parameters(self.model))
        self._check(base)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters: A and B of each layer, or those of :meth:`replace`."""
        return self._replaced or [p for _, p in self.named]

    @property
    def lora_b(self) -> list[nn.Parameter]:
        """The B of each layer."""
        return [p for name, p in self.named if ".lora_B." in name]

    def hidden(self, ids: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the last hidden states, [rows, width, size].

        Args:
            segments: int64 [rows, width]. A token attends to tokens before it of its own segment and of segment 0,
                and its position is their number. By default, to all tokens before it.
        """
        causal = self._mask(ids.shape[1])
        if segments is None:
            mask, places = causal, None
        else:
            other = (segments[:, None, :] != segments[:, :, None]) & (segments[:, None, :] != 0)
            mask = causal.masked_fill(other[:, None], torch.finfo(self._dtype).min)
            places = (mask[:, 0] == 0).sum(-1) - 1
        found: Tensor = self._decoder(
            input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False
        ).last_hidden_state
        return found

    def used_hidden(self, ids: Tensor, used: Tensor) -> Tensor:
        """Return the last hidden states where ``used``, bool [rows, width]; elsewhere they mean nothing.

        On a CPU the used tokens run as one row without padding. On CUDA all run, as graphs need static shapes.
        """
        if self.device.type == "cuda":
            return self.hidden(ids)
        packed = self.hidden(ids[used][None], 1 + used.nonzero()[None, :, 0])
        found = packed.new_zeros(*ids.shape, packed.shape[-1])
        found[used] = packed[0]
        return found

    def logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits, [..., vocabulary]."""
        found: Tensor = self._embedding(hidden)
        return found.float()

    def reset(self, seed: int) -> None:
        """Make the adapter anew: A is drawn from ``seed`` as PEFT draws it, B is zero. There are no gradients.

        Whatever else a method changed is undone first, see :meth:`until_reset`.
        """
        while self._undo:
            self._undo.pop()()
        self.draw(seed)
        self.clear()

    def draw(self, seed: int) -> None:
        """Draw A from ``seed``, and set B to zero."""
        torch.manual_seed(seed)
        for _, layer in self.layers():
            layer.reset_lora_parameters(_ADAPTER, True)

    def until_reset(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` at the next reset. The calls of several run in reverse order."""
        self._undo.append(undo)

    def replace(self, parameters: list[nn.Parameter], variant: str) -> None:
        """Train ``parameters`` in place of A and B until the next reset. They may be some of those."""
        self.clear()
        self._train(parameters, variant)
        self.until_reset(self._restore)

    def freeze_a(self) -> None:
        """Train B alone until the next reset."""
        self.replace(self.lora_b, "b")

    def _restore(self) -> None:
        self.clear()
        self._train([], "")

    def _train(self, parameters: list[nn.Parameter], variant: str) -> None:
        self._replaced, self.variant = parameters, variant
        trained = set(self.parameters)
        for _, p in self.named:
            p.requires_grad_(p in trained)

    def clear(self) -> None:
        """Remove the gradients."""
        for p in self.parameters:
            p.grad = None

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / r."""
        return float(next(self.layers())[1].scaling[_ADAPTER])

    @staticmethod
    def factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
        """Return A [r, in] and B [out, r] of an adapted layer."""
        return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight

    def layers(self) -> Iterator[tuple[str, Any]]:
        """Yield the base model's name and the module of each adapted layer."""
        for name, module in self.model.named_modules():
            if hasattr(module, "reset_lora_parameters"):
                yield name.removeprefix("base_model.model."), module

    @torch.no_grad()
    def start_in(self, directions: dict[str, Tensor]) -> None:
        """Project the rows of each A onto ``directions`` [in, n], by layer (orthonormal). They keep their lengths.

        Raises:
            ValueError: this would change what the adapter has learnt.
        """
        for name, layer in self.layers():
            a, b = self.factors(layer)
            rest = (a @ directions[name]) @ directions[name].T
            moved = rest * (a.norm(dim=1, keepdim=True) / rest.norm(dim=1, keepdim=True))
            if bool(b.any()) and not torch.allclose(moved, a, rtol=1e-3, atol=1e-5):
                raise ValueError(TRAINED)
            a.copy_(moved)

    def _mask(self, width: int) -> Tensor:
        """Return the causal mask, [1, 1, width, width]. Given one, Transformers reads no values of the inputs."""
        if width not in self._masks:
            blocked = torch.full((width, width), torch.finfo(self._dtype).min, dtype=self._dtype, device=self.device)
            self._masks[width] = blocked.triu(1)[None, None]
        return self._masks[width]

    @torch.no_grad()
    def _check(self, base: Any) -> None:
        ids = torch.arange(1, 9, device=self.device)[None]
        expected = base(input_ids=ids, use_cache=False).logits.float()
        found = self.logits(self.hidden(ids))
        if not torch.allclose(found, expected, rtol=1e-2, atol=1e-2):
            raise ValueError(
                f"the logits of {type(base).__name__} are not the output embedding of its last hidden state (they may "
                "be scaled or capped); choose another model"
            )


def answer_loss(model: Language, batch: Batch, unit: str) -> Tensor:
    """Return the loss of the answers in nats.

    Args:
        unit: "token" for the mean over answer tokens, "row" for the sum over an answer's tokens, mean over rows.
    """
    ids, positions, targets = batch
    last = positions.masked_fill(targets == -100, 0).amax(1, keepdim=True)  # what follows it changes nothing
    hidden = model.used_hidden(ids, torch.arange(ids.shape[1], device=ids.device) <= last)
    total = nn.functional.cross_entropy(
        model.logits(states_at(hidden, positions)).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum"
    )
    return total / (len(ids) if unit == "row" else (targets != -100).sum())


def states_at(hidden: Tensor, positions: Tensor) -> Tensor:
    """Return the hidden states [rows, K, size] at positions [rows, K]."""
    return hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[-1]))


def token_loss(model: Language, ids: Tensor) -> Tensor:
    """Return the mean loss of the tokens ``ids`` [rows, width] in nats."""
    logits = model.logits(model.hidden(ids)[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def grads(parameters: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of the parameters.

    Raises:
        RuntimeError: a parameter has none.
    """
    found = [p.grad for p in parameters]
    there = [gradient for gradient in found if gradient is not None]
    if len(there) != len(found):
        raise RuntimeError(f"{len(found) - len(there)} of {len(found)} parameters have no gradient")
    return there


def kl(model: Language, hidden: Tensor, start: Tensor) -> Tensor:
    """Return KL(start || now) in nats, mean over positions, of the predictions of hidden states [positions, size]."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for now, before in zip(hidden.split(_CHUNK), start.split(_CHUNK), strict=True):
        now, before = (model.logits(part).log_softmax(-1) for part in (now, before))
        total = total + (before.exp() * (before - now)).sum()
    return total / len(hidden)


class Gradient:
    """Compute gradients of losses of static shapes. On CUDA each loss is captured once as a CUDA graph and replayed.

    A graph is kept only if its gradient equals that of the loss itself. Otherwise, and on other devices, the loss is
    differentiated at every call.
    """

    def __init__(self, model: Language, *, graphs: bool = True) -> None:
        self._model = model
        self._graphs = graphs and model.device.type == "cuda"
        self._captured: dict[object, tuple[Any, list[Tensor], list[Tensor | None]]] = {}
        self._refused: set[object] = set()
        # One graph runs at a time and its gradients are used before the next one runs, so all share their memory.
        self._pool = torch.cuda.graph_pool_handle() if self._graphs else None

    def __call__(self, key: object, loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Set ``p.grad`` of the adapter's parameters to the gradient of ``loss(*inputs)``.

        Args:
            key: what the loss depends on, except its inputs and the parameters. Inputs of another shape are another
                graph.
        """
        key = _with_shapes(key, inputs)
        self._capture(key, loss, inputs)
        if key not in self._captured:
            self._model.clear()
            loss(*inputs).backward()
            return
        graph, buffers, gradients = self._captured[key]
        for buffer, part in zip(buffers, inputs, strict=True):
            buffer.copy_(part, non_blocking=True)
        for p, gradient in zip(self._model.parameters, gradients, strict=True):
            p.grad = gradient
        graph.replay()

    def prepare(self, key: object, loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        """Capture the loss, if that is not done."""
        self._capture(_with_shapes(key, inputs), loss, inputs)

    def _capture(self, key: object, loss: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        if not self._graphs or key in self._captured or key in self._refused:
            return
        buffers = [part.clone() for part in inputs]
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self._model.clear()
                    loss(*buffers).backward()
            torch.cuda.current_stream().wait_stream(stream)
            expected = self._flat().clone()
            self._model.clear()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                loss(*buffers).backward()
            graph.replay()
            error = float((self._flat() - expected).norm() / expected.norm())
            if not error < 0.05:
                raise RuntimeError(f"the gradient of the graph differs by {error:.2g}")
            self._captured[key] = graph, buffers, [p.grad for p in self._model.parameters]
        except torch.OutOfMemoryError:
            self._model.clear()
            raise
        except RuntimeError as error:
            warnings.warn(f"no CUDA graph of {key}: {error}", stacklevel=3)
            self._refused.add(key)
            self._model.clear()

    def _flat(self) -> Tensor:
        return torch.cat([p.grad.flatten() for p in self._model.parameters if p.grad is not None])


def _with_shapes(key: object, inputs: Sequence[Tensor]) -> object:
    return key, tuple(tuple(part.shape) for part in inputs)
