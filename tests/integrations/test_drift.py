"""The measured drift is the KL from the base model, whatever wraps the model, and it changes nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from gradguide.integrations.transformers import drift
from tests.integrations.lora import QUIET
from tests.sources.structured.problems import adapted, gpt2, llama, spread, text

pytestmark = QUIET


def padded(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Exclude the last five tokens of each first row, and put other tokens there."""
    for batch in batches:
        batch["attention_mask"][0, -5:] = 0
        batch["input_ids"][0, -5:] = 3
    return batches


def expected(base: nn.Module, model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Return the drift in float64, position by position."""
    values = []
    with torch.no_grad():
        for batch in batches:
            p, q = (m.eval()(**batch).logits.double().softmax(-1) for m in (base, model))
            for row, column in batch["attention_mask"].nonzero().tolist():
                values.append(float((p[row, column] * (p[row, column] / q[row, column]).log()).sum()))
    return sum(values) / len(values)


def moved(**options: Any) -> nn.Module:
    model = adapted(llama(), **options)
    spread(model, 0.3)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrap", [False, True])
def test_it_is_the_mean_kl_over_the_positions_that_count(
    wrap: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, base, batches = moved().to(dtype), llama().to(dtype), padded(text(3))
    whole: nn.Module = Wrapped(model) if wrap else model
    found = drift(whole, batches)
    assert found > 1e-3
    assert found == pytest.approx(expected(base, model, batches), rel=1e-4)
    monkeypatch.setattr("gradguide.integrations.drift._POSITIONS", 7)
    assert found == pytest.approx(drift(model, batches, base=base), rel=1e-5)


def test_both_models_run_without_dropout() -> None:
    base, model = gpt2().train(), gpt2().train()
    assert drift(model, text(1), base=base) == pytest.approx(0.0, abs=1e-6)
    assert base.training
    assert model.training


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_2", "olora"])
def test_an_adapter_whose_start_changed_the_weights_needs_the_base(start: str) -> None:
    model, batches = moved(init_lora_weights=start), text(3)
    with pytest.raises(ValueError, match=rf"adapter 'default' \({start}\) changed weights of the base model.* base="):
        drift(model, batches)
    assert drift(model, batches, base=llama()) == pytest.approx(expected(llama(), model, batches), rel=1e-4)


def test_kasa_needs_the_base() -> None:
    """It removes the smallest singular values of the weight."""
    kasa: Any = getattr(peft, "KasaConfig", None)
    if kasa is None:
        pytest.skip("this version of PEFT has no KaSA")
    with pytest.raises(ValueError, match=r"adapter 'default' \(kasa\) changed weights of the base model"):
        drift(moved(kasa_config=kasa()), text(1))


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **inputs: Any) -> Any:
        return self.module(**inputs)


def test_a_fresh_adapter_has_none() -> None:
    assert drift(adapted(llama()), text(2)) == pytest.approx(0.0, abs=1e-7)


def test_labels_are_not_used() -> None:
    model, batches = moved(), text(2)
    labelled = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in batches]
    assert drift(model, labelled) == drift(model, batches)


def test_whole_weights_are_compared_with_a_base() -> None:
    base, model = llama(), llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    assert drift(model, text(2), base=base) == pytest.approx(expected(base, model, text(2)), rel=1e-4)


def test_nothing_changes() -> None:
    model = moved(lora_dropout=0.5)
    model.train()
    model(**text(1)[0]).logits.sum().backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = drift(model, text(2))
    assert drift(model, text(2)) == first  # dropout is off
    assert all(module.training for module in model.modules() if "Dropout" in type(module).__name__)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for p, gradient in zip(model.parameters(), gradients, strict=True):
        assert (p.grad is None) == (gradient is None)
        assert p.grad is None or gradient is None or torch.equal(p.grad, gradient)
    assert model.get_model_status().enabled is not False  # type: ignore[operator]


def frozen(model: Any) -> None:
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)


def loaded_for_inference(model: Any) -> None:
    model.requires_grad_(False)


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def partly_disabled(model: Any) -> None:
    model.get_base_model().model.layers[0].mlp.up_proj.enable_adapters(False)


def several(model: Any) -> None:
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])


@pytest.mark.filterwarnings("ignore:The model contains some adapter layers:UserWarning")
@pytest.mark.parametrize("state", [frozen, loaded_for_inference, disabled, partly_disabled, several])
@pytest.mark.parametrize("fails", [False, True])
def test_adapters_stay_as_they_were(state: Callable[[Any], None], fails: bool) -> None:
    model: Any = moved()
    state(model)

    def found() -> list[Any]:
        enabled = [m.disable_adapters for m in model.modules() if hasattr(m, "disable_adapters")]
        return [[p.requires_grad for p in model.parameters()], enabled, model.active_adapters, model.training]

    def one() -> Iterator[dict[str, Tensor]]:
        yield from text(1)
        if fails:
            raise RuntimeError("the file ends here")

    wanted = expected(llama(), model, text(1))
    model.train()
    before = found()
    if fails:
        with pytest.raises(RuntimeError, match="ends here"):
            drift(model, one())
    else:
        assert drift(model, one()) == pytest.approx(wanted, rel=1e-4, abs=1e-7)
    assert found() == before


def outputs(model: Any, change: Callable[[Tensor], Tensor]) -> None:
    """Change the logits of a model, with adapters and without."""
    model.get_base_model().lm_head.register_forward_hook(lambda module, args, logits: change(logits))


def without_last(logits: Tensor) -> Tensor:
    return torch.cat([logits[..., :-1], torch.full_like(logits[..., -1:], -math.inf)], -1)


def test_an_excluded_class_adds_nothing() -> None:
    model, wanted = moved(), []
    for m in (llama(), model):
        with torch.no_grad():
            wanted.append(m.eval()(**text(1)[0]).logits[..., :-1].double().log_softmax(-1))
    outputs(model, without_last)
    kl = (wanted[0].exp() * (wanted[0] - wanted[1])).sum(-1).mean()
    assert drift(model, text(1)) == pytest.approx(float(kl), rel=1e-4)


def test_a_class_that_only_the_model_excludes_is_infinitely_far() -> None:
    base, model = llama(), llama()
    model.lm_head.register_forward_hook(lambda module, args, logits: without_last(logits))
    assert drift(model, text(1), base=base) == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_predictions(value: float) -> None:
    model = moved()
    outputs(model, lambda logits: torch.full_like(logits, value))
    with pytest.raises(ValueError, match="hold NaN or inf"):
        drift(model, text(1))


@pytest.mark.parametrize("trains", [False, True])
def test_a_base_that_has_the_adapters_too_is_refused(trains: bool) -> None:
    """``get_peft_model`` changes the model that it is given."""
    base = llama()
    model = adapted(base)
    spread(model, 0.3)
    model.requires_grad_(trains)
    for same in (base, model):
        with pytest.raises(ValueError, match=r"base shares .* parameters with the model"):
            drift(model, text(1), base=same)


def test_a_base_may_share_frozen_weights() -> None:
    base, model = llama().requires_grad_(False), llama()
    model.model.embed_tokens.weight = base.model.embed_tokens.weight
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    assert drift(model, text(1), base=base) == pytest.approx(expected(base, model, text(1)), rel=1e-4)


def encoder_decoders() -> tuple[nn.Module, nn.Module]:
    config = T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0, pad_token_id=0
    )
    torch.manual_seed(0)
    base, model = T5ForConditionalGeneration(config), T5ForConditionalGeneration(config)
    return base, model


def test_positions_of_an_encoder_decoder_are_those_of_its_decoder() -> None:
    base, model = encoder_decoders()
    ids = text(1)[0]["input_ids"]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    batch["attention_mask"][:, 8:] = 0
    with torch.no_grad():
        p, q = (m.eval()(**batch).logits.double().log_softmax(-1) for m in (base, model))
    kl = (p.exp() * (p - q)).sum(-1)
    assert drift(model, [batch], base=base) == pytest.approx(float(kl.mean()), rel=1e-4)
    # These positions come first and do not attend to the excluded ones.
    batch["decoder_attention_mask"] = torch.ones_like(ids)
    batch["decoder_attention_mask"][:, 8:] = 0
    assert drift(model, [batch], base=base) == pytest.approx(float(kl[:, :8].mean()), rel=1e-4)


def test_labels_alone_do_not_give_the_decoder_inputs() -> None:
    base, model = encoder_decoders()
    batch = {**text(1)[0], "labels": text(1)[0]["input_ids"]}
    with pytest.raises(ValueError, match=r"add model[.]prepare_decoder_input_ids_from_labels"):
        drift(model, [batch], base=base)


def classifiers(classes: int) -> tuple[nn.Module, nn.Module]:
    config = BertConfig(
        vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        num_labels=classes,
    )  # fmt: skip
    torch.manual_seed(0)
    return BertForSequenceClassification(config), BertForSequenceClassification(config)


def test_of_a_classifier_rows_count() -> None:
    base, model = classifiers(3)
    with torch.no_grad():
        for m in (base, model):
            m.classifier.weight.mul_(30.0)  # type: ignore[operator, union-attr]
        batches = text(2, length=3)  # as many tokens as classes
        p, q = (
            torch.cat([m.eval()(**batch).logits for batch in batches]).double().log_softmax(-1) for m in (base, model)
        )
    assert drift(model, batches, base=base) == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_a_regression_has_no_predictions() -> None:
    base, model = classifiers(1)
    with pytest.raises(ValueError, match="2 classes or more, found 1"):
        drift(model, text(1), base=base)


def test_a_mask_of_other_positions_is_refused() -> None:
    ids = text(1)[0]["input_ids"]
    square = torch.ones(3, 1, 16, 16, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask must have the shape of the predictions \(3, 16\)"):
        drift(moved(), [{"input_ids": ids, "attention_mask": square}])


@pytest.mark.parametrize("batches", [text(1)[0], ["a text"]])
def test_one_batch_and_plain_texts_are_refused(batches: Any) -> None:
    with pytest.raises(TypeError, match=r"found str: pass \[batch\]"):
        drift(moved(), batches)


def test_modules_to_save_count() -> None:
    model = adapted(llama(), modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)  # type: ignore[union-attr, index]
    assert drift(model, text(2)) == pytest.approx(expected(llama(), model, text(2)), rel=1e-4)


def test_trained_tokens_count() -> None:
    model = moved(trainable_token_indices=[1, 2])
    assert drift(model, text(2)) == pytest.approx(expected(llama(), model, text(2)), rel=1e-4)


class Headed(nn.Module):
    """A head of its own behind an adapted model."""

    def __init__(self) -> None:
        super().__init__()
        self.model = moved()
        self.head = nn.Linear(48, 3)

    def forward(self, **inputs: Any) -> Any:
        found = self.model(**inputs)
        return type(found)(logits=self.head(found.logits))


def test_a_head_around_the_adapted_model_needs_a_base_while_it_is_trained() -> None:
    model = Headed()
    with pytest.raises(ValueError, match=r"not part of an adapter \(first: head"):
        drift(model, text(1))
    model.head.requires_grad_(False)
    assert drift(model, text(1)) > 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: llama(), "no PEFT adapters to disable: pass the model before training, base="),
        (lambda: adapted(gpt2(), bias="all", fan_in_fan_out=True), "not part of an adapter"),
        # Loaded for inference, where nothing is trained any more.
        (lambda: adapted(gpt2(), bias="all", fan_in_fan_out=True).requires_grad_(False), "not part of an adapter"),
        (lambda: merged(), "merged into the weights"),
    ],
)
def test_what_has_no_base_to_compare_with(model: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drift(model(), text(1))


@pytest.mark.parametrize("masked", [True, False])
def test_learned_tokens_before_the_text_are_not_compared(masked: bool) -> None:
    model: Any = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batches = [b if masked else {"input_ids": b["input_ids"]} for b in text(2)]
    with torch.no_grad():
        logits = [(model(**b).logits[:, 3:], model.base_model(**b).logits, b) for b in batches]
    used = [b["attention_mask"].bool() if masked else torch.ones_like(b["input_ids"]).bool() for b in batches]
    total = sum(
        float(nn.functional.kl_div(now[u].log_softmax(-1), start[u].log_softmax(-1), reduction="sum", log_target=True))
        for (now, start, _), u in zip(logits, used, strict=True)
    )
    assert drift(model, batches) == pytest.approx(total / sum(int(u.sum()) for u in used), rel=1e-4)
    assert drift(model, batches) > 0
    assert drift(model, batches, base=copy.deepcopy(model)) == pytest.approx(0.0, abs=1e-6)


def merged() -> nn.Module:
    model: Any = moved()
    model.merge_adapter()
    return model  # type: ignore[no-any-return]


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="at least one position, found none"):
        drift(adapted(llama()), [])
