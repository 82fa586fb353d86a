"""Guide every method of PEFT: the table of tests/contract/README.md, cell by cell."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from tests.contract import kit
from tests.integrations.peft_variants import DEFAULT, MESSAGES, VARIANTS, WORKS, Variant, four_bit, table
from tests.sources.structured.problems import llama, spread, text, trained

pytestmark = pytest.mark.filterwarnings("ignore")

BATCHES = text(3)


@pytest.fixture(params=[pytest.param(n, marks=() if n in DEFAULT else pytest.mark.slow) for n in VARIANTS])
def variant(request: pytest.FixtureRequest) -> Variant:
    if "bitsandbytes" in request.param:
        pytest.importorskip("bitsandbytes")
    return VARIANTS[request.param]


def loss_of(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    value: Tensor = model(**batch, labels=batch["input_ids"]).loss
    return value


def train(model: nn.Module, optimizer: torch.optim.Optimizer, clip: float | None = None) -> None:
    for batch in BATCHES:
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def test_a_guided_step_is_the_base_s_on_the_clipped_gradient(variant: Variant) -> None:
    model, plain = variant.make(), variant.make()
    base = variant.optimizer(model)
    start = {name: p.detach().clone() for name, p in trained(model).items()}
    optimizer = GradGuide(base, direction=None, magnitude=Magnitude(max_norm=1e-4, max_update=None))
    train(model, optimizer)
    train(plain, variant.optimizer(plain), clip=1e-4)
    assert optimizer.metrics()["clip_factor"] < 1
    torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-4, atol=1e-5)
    assert [name for name, p in trained(model).items() if torch.equal(p, start[name])] == []


def test_i03_all_rules_with_the_base_s_state_resume_bitwise(variant: Variant) -> None:
    model, other = variant.make(), variant.make()
    optimizer = GradGuide(variant.optimizer(model), direction=Direction())
    train(model, optimizer)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = GradGuide(variant.optimizer(other), direction=Direction())
    with torch.no_grad():
        for name, p in trained(other).items():
            p.copy_(trained(model)[name])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    train(model, optimizer)
    train(other, resumed)
    assert resumed.metrics()["steps"] == 6
    assert 0 < resumed.metrics()["update_norm"] < float("inf")
    kit.assert_same(kit.parameters_of(other), kit.parameters_of(model))


def test_a_stored_source_adds_its_mean_gradient(variant: Variant) -> None:
    model = variant.make().eval()
    spread(model, 0.05)
    source = SourceGradient.capture(model, BATCHES, loss_of)
    parameters = trained(model)
    loss = torch.stack([loss_of(model, batch) for batch in BATCHES]).mean()
    wanted = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    optimizer = GradGuide(
        torch.optim.SGD(model.parameters(), lr=0.0),
        direction=None,
        magnitude=None,
        alignment=Alignment(source, weight=3.0, project=False),
        names=model,
    )
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert max(float(g.abs().max()) for g in wanted) > 0
    for p, g in zip(parameters.values(), wanted, strict=True):
        torch.testing.assert_close(p.grad, 1 + 3 * g, rtol=1e-4, atol=1e-5)


def weight_of(model: nn.Module, layer: str, inputs: int) -> Tensor:
    """Return the weight of a layer as its forward pass shows it: the change of the output per unit of each input."""
    module: Any = next(module for name, module in model.named_modules() if name.endswith(layer))
    found: Tensor = (module(torch.eye(inputs)) - module(torch.zeros(1, inputs))).T
    return found.double()


def check_pull(source: StructuredSource, model: nn.Module, starts: dict[str, Tensor]) -> None:
    """Compare the pull and the drift with those of the layers' forward passes, after a random move."""
    bound = source.bound(model)
    spread(model, 0.05)
    energy = drift = torch.zeros((), dtype=torch.float64)
    for name in source.names():
        s, g = (factor.double() for factor in source.factors(name))
        moved = weight_of(model, name, len(s[0])) - starts[name]
        floor = source.floor / source._layers[name].scale * torch.eye(len(g[0]))
        energy = energy + 0.5 * (moved.T @ (g + floor) @ moved @ s).diagonal(dim1=-2, dim2=-1).sum()
        drift = drift + 0.5 * (moved.T @ g @ moved @ s).diagonal(dim1=-2, dim2=-1).sum()
    parameters = trained(model)
    values = list(parameters.values())
    wanted = torch.autograd.grad(energy, values, allow_unused=True, materialize_grads=True)
    bound.refresh(parameters, values)
    assert bound.drift is not None
    assert float(bound.drift) == pytest.approx(float(drift), rel=1e-3)
    largest = max(float(g.abs().max()) for g in wanted)
    assert largest > 0
    for (name, p), pull in zip(parameters.items(), wanted, strict=True):
        found = bound.row([name], [p.detach()]).value(0, torch.float32)
        torch.testing.assert_close(found.reshape(p.shape), pull, rtol=1e-3, atol=1e-4 * largest, msg=name)


def captured(model: nn.Module) -> StructuredSource:
    torch.manual_seed(0)
    return StructuredSource.capture(model, text(4), sampled_loss, rank=None)


def check_outcome(variant: Variant, outcome: str, source_of: Any, start_of: Any) -> None:
    model = variant.make().eval()
    variant.optimizer(model)  # that of LoRA-FA freezes A
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    if outcome != WORKS:
        with pytest.raises(ValueError, match=MESSAGES[outcome]):
            source_of().bound(model)
        kit.assert_same(dict(model.named_parameters()), before)
        return
    source = source_of()
    with torch.no_grad():
        start = start_of()
        starts = {name: weight_of(start, name, source._layers[name].shape[1]) for name in source.names()}
    check_pull(source, model, starts)


def test_a_structured_source_of_the_base_model(variant: Variant) -> None:
    plain = variant.plain().eval()
    check_outcome(variant, variant.base_source, lambda: captured(plain), lambda: plain)


def test_a_structured_source_captured_with_the_adapter(variant: Variant) -> None:
    """The change of the weight counts from the adapter at capture, which need not be zero."""

    def start() -> nn.Module:
        return variant.make().eval()

    check_outcome(variant, variant.own_source, lambda: captured(start()), start)


def test_the_table_has_these_outcomes() -> None:
    readme = Path(__file__).parents[1] / "contract" / "README.md"
    assert table() in readme.read_text(encoding="utf-8"), f"update the table of PEFT's methods:\n{table()}"


def test_a_start_that_changed_a_weight_beside_a_quantised_source_is_refused() -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    quantised: Any = four_bit()
    source = StructuredSource.capture(quantised, BATCHES, sampled_loss, rank=4)
    model = LlamaForCausalLM(quantised.config)
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    source.bound(peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**options)))
    with pytest.raises(ValueError, match=r"init_lora_weights='pissa'.*cannot be compared.*is quantised"):
        source.bound(peft.get_peft_model(model, peft.LoraConfig(init_lora_weights="pissa", **options)))


def test_weights_that_torchao_quantised_are_captured_and_adapted() -> None:
    """Check tensor subclasses whose elements cannot be read, beside a head that requires a gradient."""
    quantization: Any = pytest.importorskip("torchao.quantization")
    model = llama(1)
    plain = StructuredSource.capture(model, BATCHES, sampled_loss, rank=4)
    keep = "o_proj"
    quantization.quantize_(
        model.model,
        quantization.Int8WeightOnlyConfig(),
        lambda module, name: isinstance(module, nn.Linear) and not name.endswith(keep),
    )
    source = StructuredSource.capture(model, BATCHES, sampled_loss, rank=4)
    assert source.names() == plain.names()
    assert [name for name in source.names() if source._layers[name].weight is not None] == [
        name for name in source.names() if name.endswith(keep)
    ]
    adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    for each in (source, plain):
        assert len(each.bound(adapter).pulled) == 2 * len(source.names())
