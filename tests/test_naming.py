"""Names without what wrappers add, the module a parameter belongs to, and what may be given as names."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from gradguide.naming import canonical, module_of, named

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PARTS = st.sampled_from(["layer", "0", "11", "weight", "bias", "lora_A", "default", "module", "my_orig_mod", *WRAPPERS])
OWN = st.text("abcz_01", min_size=1, max_size=6).filter(lambda part: part not in (*WRAPPERS, "module"))


@given(st.lists(PARTS, min_size=1, max_size=8).map(".".join))
def test_twice_is_once(name: str) -> None:
    assert canonical(canonical(name)) == canonical(name)


@given(st.lists(OWN, min_size=1, max_size=6).map(".".join))
def test_names_of_a_plain_model_stay(name: str) -> None:
    assert canonical(name) == name


@given(
    st.lists(PARTS.filter(lambda part: part not in WRAPPERS), min_size=1, max_size=5),
    st.lists(st.sampled_from(["module", *WRAPPERS]), max_size=4),
)
def test_prefixes_of_wrappers_change_nothing(parts: list[str], prefixes: list[str]) -> None:
    assert canonical(".".join([*prefixes, *parts])) == canonical(".".join(parts))


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
    return [("module.b.weight", nn.Parameter(torch.zeros(1))), ("a._orig_mod.weight", nn.Parameter(torch.zeros(1)))]


def test_named_from_every_form() -> None:
    given_pairs = pairs()
    wanted = {given_pairs[0][1]: "b.weight", given_pairs[1][1]: "a.weight"}

    def generator() -> Iterator[tuple[str, Tensor]]:
        yield from given_pairs

    for form in (given_pairs, generator(), dict(given_pairs), {p: name for name, p in given_pairs}):
        found = named(form)
        assert found == wanted
        assert list(found.values()) == ["b.weight", "a.weight"]


def test_first_name_of_a_shared_parameter_counts() -> None:
    shared = nn.Parameter(torch.zeros(1))
    assert named([("embed.weight", shared), ("head.weight", shared)]) == {shared: "embed.weight"}


def test_the_same_pair_twice_is_no_conflict() -> None:
    one = nn.Parameter(torch.zeros(1))
    assert named([("a", one), ("module.a", one)]) == {one: "a"}


@pytest.mark.parametrize("second", ["a.weight", "module.a.weight", "a._orig_mod.weight"])
def test_one_name_for_two_parameters(second: str) -> None:
    with pytest.raises(ValueError, match=r"unique, found 'a\.weight' for two parameters"):
        named([("a.weight", nn.Parameter(torch.zeros(1))), (second, nn.Parameter(torch.zeros(1)))])


@pytest.mark.parametrize(
    "wrong", [[nn.Parameter(torch.zeros(1))], ["a"], [("a", "b")], {"a": 1}, [(torch.zeros(1), torch.zeros(1))], [()]]
)
def test_what_does_not_pair(wrong: object) -> None:
    with pytest.raises(TypeError, match="names must pair parameters with their names"):
        named(wrong)  # type: ignore[arg-type]
