"""Compare captured mean gradients with gradients in closed form."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm
from transformers import BatchEncoding

from gradguide import SourceGradient
from gradguide.sources import capture

from .problems import Table, answer, close, cross_entropy, fisher, per_example, softmax_problem, split


def mean(gradients: Table) -> Table:
    return {name: g.mean(dim=0) for name, g in gradients.items()}


@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1, 7, 3], [1] * 11, [10, 1]])
def test_mean_is_the_full_batch_gradient(sizes: list[int]) -> None:
    model, x, y = softmax_problem(11)
    source = SourceGradient.capture(model, split(x, y, sizes), cross_entropy, curvature=False, dtype=torch.float64)
    assert not source.curvature
    close(answer(source), mean(per_example(model, x, y)))
    assert source.metadata["examples"] == 11
    with torch.no_grad():
        assert source.metadata["loss"] == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-12)
    assert source.metadata["curvature"] is None


def test_mean_does_not_depend_on_curvature() -> None:
    model, x, y = softmax_problem(8)
    source = SourceGradient.capture(model, split(x, y, [3, 3, 2]), cross_entropy, dtype=torch.float64)
    assert source.curvature
    assert source.metadata["curvature"] == "empirical"
    close(answer(source, dict(model.named_parameters())), mean(per_example(model, x, y)))


def test_only_trainable_parameters_in_model_order() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[1].requires_grad_(False)
    source = SourceGradient.capture(
        model, [torch.randn(5, 3, dtype=torch.float64)], lambda m, b: m(b).square().mean(), curvature=False
    )
    assert source.names() == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert source.shapes()["2.weight"] == torch.Size([2, 4])


@pytest.mark.parametrize("curvature", [False, True])
def test_i31_unused_parameters_are_stored_as_zero_and_named(curvature: bool) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)}).double()
    batches = [torch.ones(3, 2, dtype=torch.float64)] * 2
    with pytest.warns(UserWarning, match=r"reached 2 of the 4 .* \(idle\.weight, idle\.bias\)") as caught:
        source = SourceGradient.capture(
            model, batches, lambda m, b: m.get_submodule("used")(b).mean(), curvature=curvature, dtype=torch.float64
        )
    assert caught[0].filename == __file__
    found = answer(source, {name: p.detach() + 1.0 for name, p in model.named_parameters()} if curvature else None)
    assert torch.equal(found["idle.weight"], torch.zeros(1, 2, dtype=torch.float64))
    assert torch.equal(answer(source, dict(model.named_parameters()))["used.weight"], torch.ones(1, 2).double())


def test_i31_a_parameter_that_one_batch_reaches_is_not_named() -> None:
    """Each of two experts gets tokens in one batch only."""
    experts = nn.ModuleList([nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)]).double()
    batches = [torch.full((2, 2), float(which), dtype=torch.float64) for which in range(2)]
    source = SourceGradient.capture(
        experts, batches, lambda m, b: m.get_submodule(str(int(b[0, 0])))(b + 1.0).mean(), curvature=False
    )
    close(answer(source), {"0.weight": torch.full((1, 2), 0.5), "1.weight": torch.full((1, 2), 1.0)})


def test_shared_parameter_counts_once_with_both_uses() -> None:
    inner = nn.Linear(2, 2, bias=False).double()
    model = nn.Sequential(inner, inner)
    x = torch.randn(4, 2, dtype=torch.float64)
    source = SourceGradient.capture(model, [x], lambda m, b: m(b).sum() / len(b), curvature=False, dtype=torch.float64)
    w = inner.weight.detach()
    ones = torch.ones(2, dtype=torch.float64)
    # d/dW of 1'WWx: 1 (Wx)' + W'1 x'.
    wanted = torch.outer(ones, w @ x.mean(0)) + torch.outer(w.T @ ones, x.mean(0))
    close(answer(source), {"0.weight": wanted})


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(None, 1e-6), (torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float64, 1e-12)]
)
def test_storage_dtype(dtype: torch.dtype | None, rtol: float) -> None:
    model, x, y = softmax_problem(9)
    source = SourceGradient.capture(model, split(x, y, [1] * 9), cross_entropy, dtype=dtype)
    row = source.row(source.names(), [p.detach() for p in model.parameters()])
    assert row.offset is not None
    assert row.scale is not None
    assert row.anchor is not None
    assert {t.dtype for t in (*row.offset, *row.scale)} == {dtype or torch.float32}
    assert all(torch.equal(a, p) for a, p in zip(row.anchor, model.parameters(), strict=True))
    assert all(a.data_ptr() != p.data_ptr() for a, p in zip(row.anchor, model.parameters(), strict=True))
    gradients = per_example(model, x, y)
    close(answer(source, dict(model.named_parameters())), mean(gradients), rtol=rtol)
    close(fisher(source, model), {n: g.square().mean(0) for n, g in gradients.items()}, rtol=rtol)


def test_sums_are_wider_than_a_bfloat16_model() -> None:
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    # 1 + 300 times 1/128: a bfloat16 sum would stop growing at 2.
    batches = [torch.full((1, 1), 1.0, dtype=torch.bfloat16)] + [
        torch.full((1, 1), 2.0**-7, dtype=torch.bfloat16) for _ in range(300)
    ]
    source = SourceGradient.capture(model, batches, lambda m, b: m(b).mean(), curvature=False)
    assert answer(source)["weight"].item() == pytest.approx((1 + 300 / 128) / 301, rel=1e-6)


class Pair(nn.Module):
    """A model with keyword inputs, like language models."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, _, _ = softmax_problem(1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.linear(x)
        return scores


def by_key(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    return F.cross_entropy(model(x=batch["x"]), batch["y"])


def test_kinds_of_batches() -> None:
    _, x, y = softmax_problem(10)
    model = Pair()
    wanted = {f"linear.{n}": g for n, g in mean(per_example(model.linear, x, y)).items()}
    pairs = split(x, y, [4, 4, 2])

    def generator() -> Iterator[dict[str, Any]]:
        for a, b in pairs:
            yield {"task": "sst2", "flag": torch.tensor(True), "x": a, "y": b}

    kinds: dict[str, tuple[Any, Any]] = {
        "tuples": (pairs, cross_entropy),
        "lists": ([list(pair) for pair in pairs], cross_entropy),
        "loader": (DataLoader(TensorDataset(x, y), batch_size=4), cross_entropy),
        "dicts, a string and a 0-d tensor first": (generator(), by_key),
        "encodings": ([BatchEncoding({"x": a, "y": b}) for a, b in pairs], by_key),
        "tensors": (
            [torch.cat([a, b[:, None].double()], dim=1) for a, b in pairs],
            lambda m, b: F.cross_entropy(m(b[:, :-1]), b[:, -1].long()),
        ),
    }
    for kind, (batches, loss) in kinds.items():
        source = SourceGradient.capture(model, batches, loss, curvature=False, dtype=torch.float64)
        assert source.metadata["examples"] == 10, kind
        close(answer(source), wanted)


def test_loss_of_one_element_and_outer_no_grad() -> None:
    model, x, y = softmax_problem(4)
    with torch.no_grad():
        source = SourceGradient.capture(
            model,
            split(x, y, [2, 2]),
            lambda m, b: cross_entropy(m, b).reshape(1),
            curvature=False,
            dtype=torch.float64,
        )
        assert not torch.is_grad_enabled()
    close(answer(source), mean(per_example(model, x, y)))


def test_metadata_is_json() -> None:
    model, x, y = softmax_problem(4)
    source = SourceGradient.capture(model, split(x, y, [2, 2]), cross_entropy, curvature=False)
    assert json.loads(json.dumps(source.metadata)) == source.metadata
    assert source.metadata["adapter"] is None
    assert source.metadata["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert set(source.metadata["versions"]) == {"gradguide", "torch", "peft", "transformers"}


def test_progress_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    # tqdm reads TQDM_DISABLE when it is imported, so an environment that sets it would else hide the bar.
    monkeypatch.setattr(capture, "tqdm", functools.partial(tqdm, disable=False))
    model, x, y = softmax_problem(6)
    SourceGradient.capture(model, split(x, y, [2, 2, 2]), cross_entropy, curvature=False)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "capturing source" in captured.err
    assert "/3" in captured.err
