"""Source text that a model writes itself is sampled from its own predictions, with any cache, and disturbs nothing."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PrefixTuningConfig, PromptLearningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from gradguide import SourceGradient
from gradguide.integrations.transformers import drift, own_text, sampled_loss
from tests.integrations.lora import QUIET
from tests.sources.structured.problems import VOCABULARY, adapted, gpt2, llama, spread, text, trained

pytestmark = QUIET


class Words:
    """A tokenizer of ``VOCABULARY`` tokens.

    Args:
        bos, eos: token ids.
        adds: whether it puts BOS before a text.
    """

    def __init__(self, bos: int | None = 0, eos: int | None = 1, adds: bool = True) -> None:
        self.bos_token_id, self.eos_token_id, self._adds = bos, eos, adds

    def __call__(self, text: str) -> dict[str, list[int]]:
        head = [self.bos_token_id] if self._adds and self.bos_token_id is not None else []
        return {"input_ids": [*head, 5]}

    def __len__(self) -> int:
        return VOCABULARY


class Masked(nn.Module):
    """A model that does not read the attention mask."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        return self.inner(input_ids)


class Uncached(nn.Module):
    """A language model without a cache, whose next token is the last one plus one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, input_ids: Tensor, use_cache: bool = False, past_key_values: None = None) -> SimpleNamespace:
        following = nn.functional.one_hot((input_ids + 1) % VOCABULARY, VOCABULARY)
        return SimpleNamespace(logits=100.0 * following)


class Wrapped(nn.Module):
    """A wrapper without a configuration, as DDP is one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, **batch: Any) -> Any:
        return self.module(**batch)


@pytest.mark.parametrize("make", [llama, gpt2, lambda: adapted(llama(1))])
def test_text_follows_the_predictions(make: type[nn.Module]) -> None:
    """Tokens have the likelihood of the model: far above that of random tokens, and equal to its own entropy."""
    model = make()
    model.train()
    state = torch.get_rng_state()
    batches = own_text(model, Words(), tokens=4000, length=40, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids.shape == (100, 40)
    assert bool((ids[:, 0] == 0).all())
    model.eval()
    with torch.no_grad():
        logs = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    found = float(-logs.gather(-1, ids[:, 1:, None]).mean())
    assert found == pytest.approx(float(-(logs.exp() * logs).sum(-1).mean()), rel=0.03)
    again = own_text(model, Words(), tokens=4000, length=40, seed=3)
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(batches, again, strict=True))
    other = own_text(model, Words(), tokens=4000, length=40, seed=4)
    assert not torch.equal(other[0]["input_ids"], again[0]["input_ids"])


def test_a_model_without_a_cache_reads_all_tokens_again() -> None:
    (batch,) = own_text(Uncached(), Words(), tokens=60, length=20)
    ids = batch["input_ids"]
    assert torch.equal(ids, torch.arange(20).expand(3, 20) % VOCABULARY)
    assert torch.equal(batch["attention_mask"], torch.ones_like(ids))


@pytest.mark.parametrize(
    ("tokenizer", "starts"),
    [
        (Words(bos=3), [3, 3, 3]),
        (Words(bos=3, adds=False), [3, 3 + 33, 3]),
        (Words(bos=None, eos=4, adds=False), [4 + 33] * 3),
    ],
    ids=["the tokenizer adds BOS", "only chat templates do", "no BOS"],
)
@pytest.mark.parametrize("size", [1, 3])
def test_sequences_start_as_texts_do_in_use(tokenizer: Words, starts: list[int], size: int) -> None:
    """Parts of longer texts start after 33 tokens; the text of this model counts up. Sequences are whole."""
    batches = own_text(Uncached(), tokenizer, tokens=41, length=20, batch_size=size)
    assert [len(batch["input_ids"]) for batch in batches] == [size] * (3 // size)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert ids[:, 0].tolist() == [start % VOCABULARY for start in starts]
    assert ids.shape == (3, 20)


def test_a_text_is_no_longer_than_the_positions_of_the_model() -> None:
    for length in (63, 64):
        (batch,) = own_text(gpt2(), Words(bos=None, adds=False), tokens=128, length=length)
        assert int((batch["input_ids"][:, 0] == 1).sum()) == (0 if length == 63 else 128 // length)


def test_without_special_tokens_texts_start_with_tokens_of_the_model() -> None:
    class Larger(Words):
        def __len__(self) -> int:
            return 50 * VOCABULARY

    batches = own_text(llama(1), Larger(bos=None, eos=None, adds=False), tokens=400, length=20)
    assert max(int(batch["input_ids"].max()) for batch in batches) < VOCABULARY


def test_a_first_token_that_the_model_does_not_embed_is_refused() -> None:
    """Such is a BOS token that was added to the tokenizer. It raised IndexError, and on CUDA an assertion."""
    model = llama(1)
    model.train()
    with pytest.raises(ValueError, match=rf"id {VOCABULARY}, and the model has {VOCABULARY} embeddings"):
        own_text(model, Words(bos=VOCABULARY, adds=False), tokens=60, length=20)
    assert model.training


def test_fewer_tokens_than_a_sequence_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens must be at least length=20, found 19"):
        own_text(Uncached(), Words(), tokens=19, length=20)


def test_models_that_do_not_continue_a_text_are_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    masked = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes))
    pair = BartForConditionalGeneration(BartConfig(vocab_size=VOCABULARY, d_model=16, **layers))
    for model, name in ((masked, "BertForMaskedLM"), (pair, "BartForConditionalGeneration")):
        with pytest.raises(ValueError, match=rf"needs a causal language model, found {name}.* batches of texts"):
            own_text(Wrapped(model), Words(), tokens=20, length=10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 1}, "length must be at least 2.* found 1"),
        ({"batch_size": 0}, "batch_size must be at least 1, found 0"),
    ],
)
def test_sizes_out_of_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own_text(Uncached(), Words(), tokens=60, **options)


def predicted(model: nn.Module, **batch: Tensor) -> list[list[int]]:
    """Return the positions whose logits have a gradient, for each row."""
    held: list[Tensor] = []

    def keep(module: nn.Module, arguments: object, output: Any) -> None:
        output.logits.retain_grad()
        held.append(output.logits)

    handle = model.register_forward_hook(keep)
    loss, count = sampled_loss(model, batch)
    handle.remove()
    loss.backward()
    assert held[0].grad is not None
    rows = [row.abs().sum(-1).nonzero().squeeze(-1).tolist() for row in held[0].grad]
    assert count == sum(map(len, rows))
    return rows


@pytest.mark.parametrize("wrap", [lambda model: model, adapted, Wrapped], ids=["plain", "adapted", "wrapped"])
def test_positions_before_a_label_count_in_a_causal_model(wrap: Any) -> None:
    ids = torch.arange(6)[None]
    model = wrap(llama(1))
    assert predicted(model, input_ids=ids, labels=torch.tensor([[-100, -100, 5, 5, -100, 5]])) == [[1, 2, 4]]
    assert predicted(model, input_ids=ids, attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1]])) == [[2, 3, 4]]
    assert predicted(model, input_ids=ids, attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]])) == [[0, 1, 2]]
    padded = {"labels": ids, "attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1]])}
    assert predicted(model, input_ids=ids, **padded) == [[1, 2, 3, 4]]
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert predicted(model, input_ids=ids, attention_mask=causal) == [[0, 1, 2, 3, 4]]


def test_the_class_of_the_base_model_decides_and_not_the_task_of_its_adapter() -> None:
    ids = torch.arange(6)[None]
    labels = torch.tensor([[-100, 5, -100, -100, 5, -100]])
    model = adapted(llama(1), task_type="FEATURE_EXTRACTION")
    assert predicted(model, input_ids=ids, labels=labels) == [[0, 3]]
    model.__class__ = type(f"FSDP{type(model).__name__}", (type(model),), {})  # as fully_shard does
    assert predicted(model, input_ids=ids, labels=labels) == [[0, 3]]


def test_models_of_images_to_text_are_causal() -> None:
    """As IdeficsForVisionText2Text of transformers."""
    kind = type("IdeficsForVisionText2Text", (LlamaForCausalLM,), {})
    model = kind(llama(1).config)
    ids = torch.arange(6)[None]
    assert predicted(model, input_ids=ids, labels=ids) == [[0, 1, 2, 3, 4]]


def test_positions_of_labels_count_in_a_token_classifier_of_a_causal_checkpoint(tmp_path: Path) -> None:
    llama(1).save_pretrained(tmp_path)
    model = LlamaForTokenClassification.from_pretrained(tmp_path)
    assert model.config.architectures == ["LlamaForCausalLM"]
    ids = torch.arange(6)[None]
    assert predicted(model, input_ids=ids, labels=torch.tensor([[-100, -100, 1, 0, -100, 1]])) == [[2, 3, 5]]


def test_positions_of_labels_count_in_an_encoder_decoder_with_a_causal_decoder() -> None:
    part = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(part, copy.deepcopy(part)))
    labels, ids = torch.tensor([[5, 6, 7, -100]]), torch.arange(4)[None]
    assert predicted(model, input_ids=ids, decoder_input_ids=ids, labels=labels) == [[0, 1, 2]]
    assert predicted(model, input_ids=ids, decoder_input_ids=ids) == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_labels": 1}, "2 classes or more, found 1: is it a regression"),
        (
            {"num_labels": 3, "problem_type": "multi_label_classification"},
            "one class of several, found 'multi_label_classification'",
        ),
    ],
)
def test_labels_that_are_not_one_class_of_several_are_refused(options: dict[str, Any], reason: str) -> None:
    config = llama().config
    config.pad_token_id = 0
    for name, value in options.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=reason):
        sampled_loss(LlamaForSequenceClassification(config), text(1)[0])
    with pytest.raises(ValueError, match=reason):
        drift(LlamaForSequenceClassification(config), text(1), base=LlamaForSequenceClassification(config))


def test_own_text_longer_than_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="length must be at most 64, the positions of the model, found 65"):
        own_text(gpt2(), Words(), tokens=96, length=65)


def test_tokens_that_an_adapter_puts_before_the_text_do_not_count() -> None:
    model = get_peft_model(llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    batch = text(1)[0]
    batch["attention_mask"][:, 8:] = 0
    torch.manual_seed(0)
    loss, number = sampled_loss(model, batch)
    assert number == 3 * 7
    logits = model(**batch).logits[:, 3:][:, :7]
    torch.manual_seed(0)
    drawn = torch.multinomial(logits.detach().float().softmax(-1).flatten(0, 1), 1).squeeze(-1)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits.flatten(0, 1), drawn))


@pytest.mark.filterwarnings("ignore:.*`past_key_values`.*deprecated:FutureWarning")
@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_text_of_a_model_with_a_learned_prompt_follows_its_predictions(kind: type[PromptLearningConfig]) -> None:
    """PEFT puts the prompt before every input, also before one that continues a cache, or drops the cache."""

    class Whole(nn.Module):
        """The model without a cache."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, input_ids: Tensor, use_cache: bool = False, past_key_values: None = None) -> SimpleNamespace:
            return SimpleNamespace(logits=self.inner(input_ids=input_ids).logits)

    model = get_peft_model(llama(), kind(task_type="CAUSAL_LM", num_virtual_tokens=3))
    found = own_text(model, Words(), tokens=160, length=20)[0]["input_ids"]
    assert torch.equal(found, own_text(Whole(model), Words(), tokens=160, length=20)[0]["input_ids"])


def test_a_model_without_a_head_is_refused() -> None:
    model, batch = llama(1).model, text(1)[0]
    for measure in (lambda: sampled_loss(model, batch), lambda: drift(model, [batch], base=llama(1).model)):
        with pytest.raises(ValueError, match=r"must have logits, found BaseModelOutput.*: give a model"):
            measure()


def test_the_loss_of_a_model_in_16_bits_is_float32() -> None:
    loss, _ = sampled_loss(llama(1).to(torch.bfloat16), text(1)[0])
    assert loss.dtype == torch.float32


def test_a_mask_of_other_positions_is_refused() -> None:
    batch = text(1)[0]
    model = Uncached()
    with pytest.raises(ValueError, match=r"attention_mask must have .* \(3, 16\), found \(3, 5\)"):
        sampled_loss(Masked(model), {**batch, "attention_mask": torch.ones(3, 5)})


def test_sampled_loss_gives_the_fisher_information_of_a_language_model() -> None:
    model = adapted(llama(layers=1))
    spread(model, 0.1)
    batches = text(3)
    torch.manual_seed(0)
    source = SourceGradient.capture(
        model, batches, lambda m, b: m(**b, labels=b["input_ids"]).loss, curvature=sampled_loss
    )
    assert source.metadata["curvature"] == "true"
    assert source.metadata["examples"] == 9
    torch.manual_seed(0)
    wanted = {name: torch.zeros_like(p) for name, p in trained(model).items()}
    number = 0
    model.eval()
    for batch in batches:
        model.zero_grad()
        loss, count = sampled_loss(model, batch)
        loss.backward()
        number += count
        for name, p in trained(model).items():
            assert p.grad is not None
            wanted[name] += (count * p.grad).square()
    assert number == 3 * 3 * 15
    for name, value in wanted.items():
        torch.testing.assert_close(source.fisher[name], value / number, rtol=1e-4, atol=1e-9)
