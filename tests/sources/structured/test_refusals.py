"""What a structured source cannot represent is refused by name, or warned of, and nothing changes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import config as lora_config
from peft.tuners.lora import gptq as lora_gptq
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gradguide.integrations.sampling import sampled_loss
from gradguide.sources.structured import StructuredSource
from gradguide.sources.structured.factors import Factor, LayerFactors
from tests.sources.structured.problems import adapted, llama, spread, text

TARGETS = ["q_proj", "v_proj"]
ADAPTERS: dict[str, Any] = {
    "DoRA": lambda: lora(use_dora=True),
    "ALora": lambda: lora(alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
    "BdLora": lambda: lora(use_bdlora=lora_config.BdLoraConfig(TARGETS, nblocks=2)),
    "Kasa": lambda: lora(r=2, kasa_config=lora_config.KasaConfig()),
    "ia3": lambda: peft.IA3Config(target_modules=TARGETS, feedforward_modules=[]),
    "loha": lambda: peft.LoHaConfig(target_modules=TARGETS, r=2),
    "lokr": lambda: peft.LoKrConfig(target_modules=TARGETS, r=2),
    "vera": lambda: peft.VeraConfig(target_modules=["q_proj"], r=2),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=TARGETS, init_r=2, total_step=10),
    "hra": lambda: peft.HRAConfig(target_modules=TARGETS, r=2),
    "fourierft": lambda: peft.FourierFTConfig(target_modules=TARGETS, n_frequency=5),
}


def lora(**options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(target_modules=TARGETS, **options)


def config_of(kind: str) -> Any:
    """Return a configuration of an adapter. Skip the test if the installed PEFT has no such kind."""
    try:
        return ADAPTERS[kind]()
    except (AttributeError, TypeError) as error:
        pytest.skip(f"this PEFT has no {kind}: {error}")


@pytest.fixture(scope="module")
def source() -> StructuredSource:
    return StructuredSource.capture(llama(1), text(2), sampled_loss, rank=4)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_other_than_lora_are_refused_by_name(source: StructuredSource, kind: str, frozen: bool) -> None:
    """Frozen ones too: their change of the weight would not count."""
    model = peft.get_peft_model(llama(1), config_of(kind))
    if frozen:
        model.requires_grad_(False)
        model.get_submodule("base_model.model.model.layers.0.mlp").requires_grad_(True)
    state = [(p.clone(), p.requires_grad) for p in model.parameters()]
    with pytest.raises(ValueError, match=rf"q_proj has .*{kind}.*SourceGradient.anchored"):
        StructuredSource.capture(model, text(1), sampled_loss, rank=4)
    with pytest.raises(ValueError, match=rf"q_proj has .*{kind}.*SourceGradient.anchored"):
        source.bound(model)
    for p, (value, needed) in zip(model.parameters(), state, strict=True):
        assert torch.equal(p, value)
        assert p.requires_grad == needed


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")
def test_x_lora_is_refused_by_name(tmp_path: Path) -> None:
    """Its adapters are those of LoRA, scaled by a function of the input."""
    adapted(llama(1)).save_pretrained(str(tmp_path))  # type: ignore[operator]
    base = llama(1)
    base.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=16, adapters={"0": str(tmp_path)}, use_trainable_adapters=True
    )
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"q_proj has an adapter of kind X-LoRA.*SourceGradient.anchored"):
        StructuredSource.capture(model, text(1), sampled_loss, rank=4)


def test_a_trained_copy_of_a_module_has_the_name_of_the_module(source: StructuredSource) -> None:
    model = adapted(llama(1), modules_to_save=["lm_head"])
    assert StructuredSource.capture(model, text(2), sampled_loss, rank=4).names() == source.names()
    head = StructuredSource.capture(model, text(2), sampled_loss, rank=4, modules=["lm_head"])
    assert head.names() == ["lm_head"]
    assert head.bound(model)._binding.names == {"base_model.model.lm_head.modules_to_save.default.weight"}  # type: ignore[union-attr]


@pytest.mark.parametrize("modules", [None, ["lm_head"]])
def test_a_disabled_adapter_is_no_part_of_the_captured_model(modules: list[str] | None) -> None:
    """The model computes without it and without the copies of modules, so the source is that of the base model."""
    base, model = llama(1), adapted(llama(1), modules_to_save=["lm_head"])
    spread(model, 0.1)
    with model.disable_adapter():  # type: ignore[operator]
        if modules is None and any(p.requires_grad for n, p in model.named_parameters() if "original_module" in n):
            pytest.skip("this PEFT trains the original of a copied module while adapters are off: that is the default")
        torch.manual_seed(0)  # for the labels
        found = StructuredSource.capture(model, text(2), sampled_loss, rank=4, modules=modules)
    torch.manual_seed(0)
    wanted = StructuredSource.capture(base, text(2), sampled_loss, rank=4, modules=modules)
    assert found.names() == wanted.names()
    assert found.fingerprint() == wanted.fingerprint()


@pytest.mark.parametrize("tied", [False, True])
def test_trained_tokens_beside_the_layers_do_not_matter(source: StructuredSource, tied: bool) -> None:
    """PEFT wraps a head that is tied to the embedding too."""
    base = llama(1)
    if tied:
        base = LlamaForCausalLM(LlamaConfig(**{**base.config.to_dict(), "tie_word_embeddings": True}))
    plain = StructuredSource.capture(base, text(2), sampled_loss, rank=4)
    model = adapted(base, trainable_token_indices=[1, 2])
    assert StructuredSource.capture(model, text(2), sampled_loss, rank=4).names() == source.names()
    assert len(plain.bound(model).pulled) == 2 * len(source.names())


def test_a_weight_that_is_computed_from_parameters_is_not_pulled() -> None:
    model = llama(1)
    head = nn.utils.parametrizations.weight_norm(model.lm_head)
    source = StructuredSource.capture(model, text(2), sampled_loss, rank=4, modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"the weight of lm_head is computed from lm_head\.parametrizations\.weight"):
        source.bound(model)
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert source.bound(model, given={layer}).pulled == {layer}
    head.requires_grad_(False)
    assert source.bound(model).pulled == {layer}


class Small(nn.Module):
    """Two layers in sequence; the second has inputs of any size."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.first, self.second, self.size = nn.Linear(3, 3), nn.Linear(3, 3), size

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.second(self.first(x) * self.size) / self.size
        return found


def square(model: nn.Module, x: Tensor) -> Tensor:
    value: Tensor = model(x).square().mean()
    return value


@pytest.mark.parametrize("rank", [None, 2])
def test_factors_that_are_not_finite_are_refused(rank: int | None) -> None:
    with pytest.raises(ValueError, match=r"the factors of second must be finite, found NaN or Inf"):
        StructuredSource.capture(Small(1e25), [torch.ones(4, 3)], square, rank=rank)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_factors_given_with_numbers_that_are_not_finite_are_refused(number: float) -> None:
    for bad in (
        Factor(torch.full((1, 3, 1), number), torch.ones(1, 3)),
        Factor(torch.ones(1, 3, 1), torch.full((1, 3), number)),
    ):
        for pair in ((GOOD, bad), (bad, GOOD)):
            with pytest.raises(ValueError, match="the factors of layer must be finite"):
                StructuredSource({"layer": LayerFactors(*pair, 1.0)})


GOOD = Factor(torch.ones(1, 3, 1), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (LayerFactors(Factor(torch.ones(1, 3, 1), torch.ones(1, 2)), GOOD, 1.0), "must be .K, n, rank. and .K, n."),
        (LayerFactors(Factor(torch.ones(3, 1), torch.ones(3)), GOOD, 1.0), "must be .K, n, rank. and .K, n."),
        (LayerFactors(Factor(torch.ones(2, 3, 1), torch.ones(2, 3)), GOOD, 1.0), "as many G as S, found 1 and 2"),
        (LayerFactors(Factor(torch.ones(1, 3, 1), -torch.ones(1, 3)), GOOD, 1.0), "rest of layer must be at least 0"),
        (
            LayerFactors(Factor(torch.ones(1, 3, 1), torch.ones(1, 3) * 1j), GOOD, 1.0),
            "must be finite floating numbers",
        ),
        (LayerFactors(GOOD, GOOD, -1.0), "scale of layer must be in"),
        (LayerFactors(GOOD, GOOD, 1.0, (torch.ones(3, 2), torch.ones(1, 3))), "anchor of layer must be"),
        (LayerFactors(GOOD, GOOD, 1.0, None, torch.ones(4).long()), "must be a list of floating numbers"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors: LayerFactors, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StructuredSource({"layer": factors})


def test_fewer_sequences_than_the_rank_warn() -> None:
    model, batches = llama(1), text(2, rows=2)
    with pytest.warns(UserWarning, match=r"7 of 7 layers received fewer sequences than the rank 5 .*q_proj, 4\)"):
        StructuredSource.capture(model, batches, sampled_loss, rank=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StructuredSource.capture(model, batches, sampled_loss, rank=None)
        StructuredSource.capture(model, batches, sampled_loss, rank=9)


def test_a_rank_above_the_size_of_a_layer_keeps_it_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = StructuredSource.capture(Small(1.0), [torch.randn(4, 3)], square, rank=64)
    assert found._layers["first"].inputs.rank == 3


def test_a_loss_that_calls_a_part_of_the_model_is_refused() -> None:
    """The part's padding would count."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama(1)

        def forward(self, **batch: Tensor) -> Any:
            return self.inner(**batch)

    model: Any = Wrapper()
    with pytest.raises(ValueError, match=r"without a call of the model .* call model\(\.\.\.\) itself"):
        StructuredSource.capture(model, text(1), lambda _, batch: sampled_loss(model.inner, batch), rank=4)
    assert StructuredSource.capture(model, text(2), lambda model, batch: (model(**batch).logits.sum(), 45), rank=4)


@pytest.mark.parametrize("weights", [[float("nan"), 1.0], [float("inf"), 1.0], [-1.0, 1.0], [0.0, 0.0], [1.0]])
def test_weights_of_a_merge_are_finite_and_not_negative(source: StructuredSource, weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights must be 2 numbers of at least 0, not all 0, found"):
        StructuredSource.merge([source, source], weights)


def test_layers_of_different_shapes_do_not_merge() -> None:
    other = Factor(torch.ones(1, 4, 1), torch.ones(1, 4))
    sources = [StructuredSource({"layer": LayerFactors(GOOD, each, 1.0)}) for each in (GOOD, other)]
    with pytest.raises(ValueError, match="layer layer has another shape in some of the sources"):
        StructuredSource.merge(sources)


def test_padding_of_an_encoder_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    ids = torch.randint(2, 48, (2, 6), generator=torch.Generator().manual_seed(0))
    whole, padded = torch.ones_like(ids), torch.ones_like(ids)
    padded[0, 4:] = 0

    def loss(model: nn.Module, mask: Tensor) -> Tensor:
        value: Tensor = model(input_ids=ids, attention_mask=mask, labels=ids).loss
        return value

    with pytest.raises(ValueError, match="encoder-decoder needs batches without padding"):
        StructuredSource.capture(model, [whole, padded], loss, rank=4)
    assert StructuredSource.capture(model, [whole], loss, rank=4).names()
    wrapped = nn.Sequential(model)
    wrapped.forward = model.forward  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="encoder-decoder needs batches without padding"):
        StructuredSource.capture(wrapped, [padded], loss, rank=4)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_a_start_that_changed_a_weight_that_cannot_be_compared_is_refused(source: StructuredSource, start: str) -> None:
    other = StructuredSource(source._layers, {k: v for k, v in source.metadata.items() if k != "base"})
    model = peft.get_peft_model(llama(1), lora(init_lora_weights=start))
    with pytest.raises(ValueError, match=rf"'default' has init_lora_weights='{start}'.*cannot be compared"):
        other.bound(model)
    own = StructuredSource.capture(model, text(2), sampled_loss, rank=4)
    StructuredSource(own._layers, {k: v for k, v in own.metadata.items() if k != "base"}).bound(model)
    other.bound(peft.get_peft_model(llama(1), lora(init_lora_weights="gaussian")))


class HQQLinear(nn.Module):
    """A linear layer as those of GPTQ, AWQ and HQQ: no nn.Linear, and without a floating-point weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("W_q", linear.weight.detach().mul(1000).round().int())
        self.W_q: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.W_q / 1000)


def packed(model: nn.Module, *, adapter: bool = False) -> nn.Module:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            new: nn.Module = HQQLinear(module)
            if adapter:
                new = lora_gptq.GPTQLoraLinear(new, "default", config=lora(), r=2)
            model.set_submodule(name, new)
    return model


LEFT_OUT = r"7 linear layers are packed by a quantiser .*first: model.layers.0.self_attn.q_proj.*, a HQQLinear"


def test_packed_layers_are_named_where_they_would_be_left_out(source: StructuredSource) -> None:
    with pytest.raises(ValueError, match=rf"has 1 linear layers that can be captured. {LEFT_OUT}"):
        StructuredSource.capture(packed(llama(1)), text(1), sampled_loss, rank=4)
    with pytest.raises(ValueError, match=rf"no linear layer is called 'q_proj'.*as lm_head. {LEFT_OUT}"):
        StructuredSource.capture(packed(llama(1)), text(1), sampled_loss, rank=4, modules="q_proj")
    model = packed(llama(1), adapter=True)
    with pytest.raises(ValueError, match=rf"changes one of the source's 7 layers.*{LEFT_OUT}.*bitsandbytes or torchao"):
        source.bound(model.requires_grad_(True), given={n for n, _ in model.named_parameters() if "lora_" in n})
    head = StructuredSource.capture(packed(llama(1)), text(2), sampled_loss, rank=4, modules="lm_head")
    assert head.names() == ["lm_head"]


class Noisy(nn.Module):
    """A layer of a user, whose floating-point weight has another name."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight_mu = nn.Parameter(linear.weight.detach().clone())
        self.register_buffer("mask", torch.ones_like(linear.weight, dtype=torch.bool))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight_mu)


def test_layers_of_a_user_that_are_no_linear_layers_are_left_out() -> None:
    model = llama(1)
    model.set_submodule("model.layers.0.mlp.up_proj", Noisy(model.get_submodule("model.layers.0.mlp.up_proj")))
    source = StructuredSource.capture(model, text(2), sampled_loss, rank=4)
    assert len(source.names()) == 6
    assert "model.layers.0.mlp.up_proj" not in source.names()
