"""Names without wrapper prefixes, the module and adapter of a parameter, and accepted forms of ``names``."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradguide.utils.names import (
    NamedParameters,
    Names,
    adapter_of,
    canonical_names,
    model_names,
    module_of,
    normalize_names,
    without_adapter,
)

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARTS = st.sampled_from(["layer", "0", "11", "weight", "bias", "lora_A", "default", "module", "my_orig_mod", *WRAPPERS])
NAMES = st.lists(st.lists(PARTS, min_size=1, max_size=8).map(".".join), min_size=1, max_size=4)
OWN = st.text("abcz_01", min_size=1, max_size=6).filter(lambda part: part not in (*WRAPPERS, "module"))


def canonical(name: str) -> str:
    return canonical_names([name])[0]


@given(NAMES)
def test_twice_is_once(names: list[str]) -> None:
    assert canonical_names(canonical_names(names)) == canonical_names(names)


@given(st.lists(st.lists(OWN, min_size=1, max_size=6).map(".".join), max_size=4))
def test_names_of_a_plain_model_stay(names: list[str]) -> None:
    assert canonical_names(names) == names


@given(
    st.lists(
        st.lists(PARTS.filter(lambda part: part not in WRAPPERS), min_size=1, max_size=5).map(".".join), min_size=1
    ),
    st.lists(st.sampled_from(["module", *WRAPPERS]), max_size=4),
)
def test_prefixes_of_wrappers_change_nothing(names: list[str], prefixes: list[str]) -> None:
    assert canonical_names([".".join([*prefixes, name]) for name in names]) == canonical_names(names)


@given(NAMES.filter(lambda names: len(set(names)) == len(names)))
def test_module_is_never_removed_so_that_two_names_become_one(names: list[str]) -> None:
    plain = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]
    assert len(set(canonical_names(names))) == len(set(plain))


@given(st.lists(OWN, min_size=1, max_size=5), st.data())
def test_wrappers_in_the_middle_change_nothing(parts: list[str], data: st.DataObject) -> None:
    wrapped = list(parts)
    for _ in range(data.draw(st.integers(0, 3))):
        wrapped.insert(data.draw(st.integers(0, len(wrapped))), data.draw(st.sampled_from(WRAPPERS)))
    assert canonical(".".join(wrapped)) == ".".join(parts)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("module.encoder.weight", "encoder.weight"),
        ("_orig_mod.module.encoder.weight", "encoder.weight"),
        ("encoder.module.weight", "encoder.module.weight"),
        ("modules.weight", "modules.weight"),
        ("module", "module"),
        ("a._fsdp_wrapped_module.b._checkpoint_wrapped_module.c", "a.b.c"),
    ],
)
def test_examples(name: str, wanted: str) -> None:
    assert canonical(name) == wanted


def test_module_stays_where_it_is_a_submodule() -> None:
    assert canonical_names(["module.weight", "weight"]) == ["module.weight", "weight"]
    assert canonical_names(["module.module.weight", "module.weight"]) == ["module.weight", "weight"]
    assert canonical_names(["module.weight"], {"weight"}) == ["module.weight"]


@pytest.mark.parametrize(
    ("name", "adapter", "wanted"),
    [
        ("m.q.lora_A.default.weight", "default", "m.q.lora_A.weight"),
        ("m.q.lora_magnitude_vector.b.weight", "b", "m.q.lora_magnitude_vector.weight"),
        ("m.embed.lora_embedding_A.b", "b", "m.embed.lora_embedding_A"),
        ("score.modules_to_save.b.out.weight", "b", "score.modules_to_save.out.weight"),
        ("module.m.q.lora_A.b.weight", "b", "m.q.lora_A.weight"),
        ("m.q.weight", None, "m.q.weight"),
        ("m.explora_A.b.weight", None, "m.explora_A.b.weight"),
        ("lora_A.default.weight", "default", "lora_A.weight"),
        ("m.q.lora_a.weight", None, "m.q.lora_a.weight"),  # torchtune
        ("m.q.lora_B.bias", None, "m.q.lora_B.bias"),  # PEFT's files
        ("score.modules_to_save.weight.weight", "weight", "score.modules_to_save.weight"),
        ("m.q.hada_w1_a.b", "b", "m.q.hada_w1_a"),
        ("m.q.vera_lambda_d.b", "b", "m.q.vera_lambda_d"),
        ("m.q.delora_lambda.b", "b", "m.q.delora_lambda"),
        ("m.q.glora_A.b.Xd", "b", "m.q.glora_A.Xd"),
        ("m.q.randlora_gamma.b", "b", "m.q.randlora_gamma"),
        ("prompt_encoder.b.embedding.weight", "b", "prompt_encoder.embedding.weight"),
        ("m.hra.b.weight", None, "m.hra.b.weight"),
    ],
)
def test_names_without_their_adapter(name: str, adapter: str | None, wanted: str) -> None:
    assert adapter_of(name) == adapter
    assert without_adapter(name) == wanted


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("encoder.layer.0.query.weight", "encoder.layer.0.query"),
        ("encoder.layer.0.query.bias", "encoder.layer.0.query"),
        ("weight", ""),
        ("base.layer.0.query.lora_A.default.weight", "base.layer.0.query"),
        ("base.layer.0.query.lora_B.default.weight", "base.layer.0.query"),
        ("base.layer.0.query.lora_magnitude_vector.default.weight", "base.layer.0.query"),
        ("base.embed.lora_embedding_A.default", "base.embed"),
        ("explora.lorax.weight", "explora.lorax"),
    ],
)
def test_module_of(name: str, wanted: str) -> None:
    assert module_of(name) == wanted


def pairs() -> list[tuple[str, Tensor]]:
    return [
        ("module.b.weight", nn.Parameter(torch.zeros(1))),
        ("module.a._orig_mod.weight", nn.Parameter(torch.zeros(1))),
    ]


def test_named_from_every_form() -> None:
    given_pairs = pairs()
    wanted = {given_pairs[0][1]: "b.weight", given_pairs[1][1]: "a.weight"}

    def generator() -> Iterator[tuple[str, Tensor]]:
        yield from given_pairs

    for form in (given_pairs, generator(), dict(given_pairs), {p: name for name, p in given_pairs}):
        found = normalize_names(form)
        assert found == wanted
        assert list(found.values()) == ["b.weight", "a.weight"]


def test_first_name_of_a_shared_parameter_counts() -> None:
    shared = nn.Parameter(torch.zeros(1))
    assert normalize_names([("embed.weight", shared), ("head.weight", shared)]) == {shared: "embed.weight"}


def test_the_same_pair_twice_is_no_conflict() -> None:
    one = nn.Parameter(torch.zeros(1))
    assert normalize_names([("a", one), ("_orig_mod.a", one)]) == {one: "a"}


@pytest.mark.parametrize("second", ["a.weight", "a._orig_mod.weight"])
def test_one_name_for_two_parameters(second: str) -> None:
    with pytest.raises(ValueError, match=r"unique, found 'a\.weight' for two parameters"):
        normalize_names([("a.weight", nn.Parameter(torch.zeros(1))), (second, nn.Parameter(torch.zeros(1)))])


@pytest.mark.parametrize(
    "wrong", [[nn.Parameter(torch.zeros(1))], ["a"], [("a", "b")], {"a": 1}, [(torch.zeros(1), torch.zeros(1))], [()]]
)
def test_what_does_not_pair(wrong: object) -> None:
    with pytest.raises(TypeError, match="names must pair parameters with their names"):
        normalize_names(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [3, None, object(), torch.ones])
def test_what_is_no_collection(wrong: object) -> None:
    with pytest.raises(TypeError, match="names must be a model, pairs as of model"):
        normalize_names(wrong)  # type: ignore[arg-type]


def test_a_model_is_read_when_a_parameter_is_new() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    names = Names(model)
    first: Tensor = model.get_parameter("0.weight")
    assert names.found == {}
    assert names.of([first]) == {first: "0.weight"}
    model.append(nn.Linear(2, 1, bias=False))
    model.get_submodule("0").weight = nn.Parameter(torch.ones(2, 2))
    assert names.of(model.parameters()) == {
        model.get_parameter("0.weight"): "0.weight",
        model.get_parameter("1.weight"): "1.weight",
    }
    assert names.reachable() == {
        "0.weight": model.get_parameter("0.weight"),
        "1.weight": model.get_parameter("1.weight"),
    }


def test_a_parameter_that_is_in_no_model_is_looked_up_once() -> None:
    model = nn.Linear(2, 1)
    names, other = Names(model), nn.Parameter(torch.zeros(1))
    assert names.of([other]) == {}
    model.register_parameter("late", other)
    assert names.of([other]) == {}
    assert names.merged(None).of([other]) == {other: "late"}


def test_a_model_is_neither_kept_alive_nor_copied() -> None:
    model = nn.Linear(2, 1)
    names = Names(model)
    names.of([model.weight])
    copied: tuple[nn.Linear, Names] = copy.deepcopy((model, names))
    assert copied[1].found == {copied[0].weight: "weight"}
    (weight,) = pickle.loads(pickle.dumps(names)).found
    assert torch.equal(weight, model.weight)
    kept, gone = model.weight, weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert names.of([kept]) == {kept: "weight"}
    assert names.reachable() == {"weight": kept}


def test_some_of_a_model_s_parameters_are_found_again_and_no_others() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    some = NamedParameters([("0.weight", model.get_parameter("0.weight"))], model)
    names = Names(some)
    model.get_submodule("0").weight = nn.Parameter(torch.ones(2, 2))  # as fully_shard does it
    assert names.of(model.parameters()) == {model.get_parameter("0.weight"): "0.weight"}
    assert set(names.reachable()) == {"0.weight", "1.weight"}
    for plain in (copy.deepcopy(some), pickle.loads(pickle.dumps(some))):
        assert type(plain) is list
        assert [name for name, _ in plain] == ["0.weight"]


def test_names_given_later_are_added_and_come_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    a, b = model.parameters()
    names = Names([("a", a)])
    assert names.merged({"b": b}).of([a, b]) == {a: "a", b: "b"}
    assert names.merged([("c", a)]).of([a, b]) == {a: "c"}
    assert names.merged(model).of([a, b]) == {a: "0.weight", b: "1.weight"}
    assert names.of([a, b]) == {a: "a"}
    with pytest.raises(ValueError, match="unique"):
        names.merged([("b", b), ("b", a)])
    assert names.of([a, b]) == {a: "a"}
    assert list(model_names(model)) == ["0.weight", "1.weight"]


def test_a_model_that_is_given_again_is_read_once() -> None:
    """``set_alignment(..., names=model)`` for each task, or at each step, gives the same model."""
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    some = NamedParameters([("weight", model.get_parameter("weight"))], model)
    names = Names(model)
    for each in (some, some, other, model, other):
        names = names.merged(each)
    assert names.models() == [other, model, model]  # all of its parameters, and some
    assert names.merged(model).models() == [model, other, model]
