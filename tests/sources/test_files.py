"""Save and load source files: sources are restored bit for bit, and other files are rejected."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gradguide import SourceGradient

from .problems import cross_entropy, softmax_problem, split


def tables(source: SourceGradient) -> dict[str, list[Tensor]]:
    """Return every tensor of the source in its stored dtype."""
    names = source.names()
    row = source.row(names, [torch.zeros(shape) for shape in source.shapes().values()])
    parts = {"offset": row.offset, "scale": row.scale, "anchor": row.anchor}
    return {label: list(part) for label, part in parts.items() if part is not None}


def equal(found: SourceGradient, wanted: SourceGradient) -> None:
    assert found.names() == wanted.names()
    assert found.metadata == wanted.metadata
    left, right = tables(found), tables(wanted)
    assert left.keys() == right.keys()
    for label, entries in right.items():
        for a, b in zip(left[label], entries, strict=True):
            assert a.dtype == b.dtype
            assert a.shape == b.shape
            assert a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8)), label


def small() -> SourceGradient:
    return SourceGradient({"b": torch.arange(4.0)}, metadata={"examples": 3})


def damaged(path: Path, tensors: dict[str, Tensor], metadata: object) -> Path:
    safetensors.torch.save_file(tensors, path, metadata={"gradguide": json.dumps(metadata)})
    return path


@pytest.mark.parametrize("curvature", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_round_trip_of_a_capture(tmp_path: Path, curvature: bool, dtype: torch.dtype) -> None:
    model, x, y = softmax_problem(6)
    source = SourceGradient.capture(model, split(x, y, [3, 2, 1]), cross_entropy, curvature=curvature, dtype=dtype)
    path = tmp_path / "folder" / "source.safetensors"
    source.save(path)
    equal(SourceGradient.load(path), source)
    # Save the loaded source to the same path, given as a string.
    SourceGradient.load(str(path)).save(str(path))
    equal(SourceGradient.load(path), source)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_order_of_names_is_the_model_s(tmp_path: Path) -> None:
    names = ["z.weight", "a/slash", "m.lora_A.default.weight", "10", "2", "ümlaut"]
    source = SourceGradient({name: torch.randn(i, 2) for i, name in enumerate(names)}, metadata={"free": [1, None]})
    source.save(tmp_path / "s.safetensors")
    loaded = SourceGradient.load(tmp_path / "s.safetensors")
    assert loaded.names() == names
    equal(loaded, source)


def test_special_values_and_odd_layouts_survive(tmp_path: Path) -> None:
    special = torch.tensor([[3e38, -3e38, -1e-45], [-0.0, 1e-45, 1.0]])
    wide = torch.randn(4, 6)
    source = SourceGradient(
        {"w": special, "v": wide.t()},
        fisher={"w": special.abs(), "v": wide.abs().t()},
        anchor={"w": torch.zeros(2, 3), "v": torch.ones(6, 1).expand(6, 4)},
    )
    source.save(tmp_path / "s.safetensors")
    equal(SourceGradient.load(tmp_path / "s.safetensors"), source)


def test_tensors_that_share_memory_are_saved(tmp_path: Path) -> None:
    one = torch.arange(4.0)
    source = SourceGradient({"a": one, "b": one[:2]}, fisher={"a": one, "b": one[2:]}, anchor={"a": one, "b": one[1:3]})
    source.save(tmp_path / "s.safetensors")
    equal(SourceGradient.load(tmp_path / "s.safetensors"), source)


def test_others_can_read_it(tmp_path: Path) -> None:
    small().save(tmp_path / "s.safetensors")
    with safetensors.safe_open(tmp_path / "s.safetensors", framework="pt") as file:
        assert list(file.keys()) == ["gradient/b"]
        metadata = json.loads(file.metadata()["gradguide"])
    assert metadata == {"format": 1, "names": ["b"], "examples": 3}


@pytest.mark.parametrize("existing", [True, False])
def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    path = tmp_path / "s.safetensors"
    if existing:
        small().save(path)
    before = path.read_bytes() if existing else None

    def torn(tensors: dict[str, Tensor], filename: Path, metadata: dict[str, str]) -> None:
        Path(filename).write_bytes(b"half of")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", torn)
        with pytest.raises(OSError, match="No space left"):
            SourceGradient({"other": torch.zeros(9)}).save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ([path.name] if existing else [])
    if existing:
        assert path.read_bytes() == before
        equal(SourceGradient.load(path), small())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_truncated_at_any_length(tmp_path: Path, data: st.DataObject) -> None:
    whole = tmp_path / "whole.safetensors"
    if not whole.exists():
        small().save(whole)
    content = whole.read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(content[:length])
    with pytest.raises(ValueError, match=r"cut\.safetensors.*truncated.*save it again with SourceGradient\.save"):
        SourceGradient.load(cut)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_any_other_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bytes.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bytes\.safetensors"):
        SourceGradient.load(path)


class Trap:
    """An object whose unpickling sets ``sprung``."""

    sprung = False

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return spring, ()


def spring() -> None:
    Trap.sprung = True


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    torch.save({"gradient": {"w": torch.ones(2)}, "trap": Trap()}, tmp_path / "zip.safetensors")
    (tmp_path / "plain.safetensors").write_bytes(pickle.dumps(Trap()))
    for name in ("zip.safetensors", "plain.safetensors"):
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            SourceGradient.load(tmp_path / name)
    assert not Trap.sprung
    pickle.loads((tmp_path / "plain.safetensors").read_bytes())
    assert Trap.sprung


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no source file at .*absent\.safetensors"):
        SourceGradient.load(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="no source file at"):
        SourceGradient.load(tmp_path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {"gradguide": "not json"}, {"gradguide": "[1]"}])
def test_safetensors_of_other_origin(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"gradient/w": torch.ones(2)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors.*no source of gradguide.*StructuredSource\.save"):
        SourceGradient.load(path)


@pytest.mark.parametrize("version", [0, -3, True, 1.9, "1", float("inf"), None])
def test_a_format_that_is_no_whole_number(tmp_path: Path, version: object) -> None:
    path = damaged(tmp_path / "s.safetensors", {"gradient/w": torch.ones(2)}, {"format": version, "names": ["w"]})
    with pytest.raises(ValueError, match="holds tensors but no source of gradguide"):
        SourceGradient.load(path)


def test_newer_format(tmp_path: Path) -> None:
    path = damaged(tmp_path / "s.safetensors", {"gradient/w": torch.ones(2)}, {"format": 2, "names": ["w"]})
    with pytest.raises(ValueError, match="has format 2, this version of gradguide reads up to 1: upgrade gradguide"):
        SourceGradient.load(path)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


ONE = torch.ones(2)
DAMAGES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "name without tensor": ({"gradient/w": ONE}, {"names": ["w", "v"]}),
    "tensor without name": ({"gradient/w": ONE, "gradient/v": ONE.clone()}, {"names": ["w"]}),
    "no names at all": ({"gradient/w": ONE}, {"names": []}),
    "names that are a number": ({"gradient/w": ONE}, {"names": 5}),
    "names that are lists": ({"gradient/w": ONE}, {"names": [["w"]]}),
    "fisher without anchor": ({"gradient/w": ONE, "fisher/w": ONE.clone()}, {"names": ["w"]}),
    "fisher of a part": (
        {"gradient/w": ONE, "gradient/v": ONE.clone(), "fisher/w": ONE.clone(), "anchor/w": ONE.clone()},
        {"names": ["w", "v"]},
    ),
    "another shape": (
        {"gradient/w": ONE, "fisher/w": torch.ones(3), "anchor/w": ONE.clone()},
        {"names": ["w"]},
    ),
    "anchor alone": ({"anchor/w": ONE}, {"names": ["w"]}),
    "no table": ({"w": ONE}, {"names": ["w"]}),
    "no tensors": ({}, {"names": ["w"]}),
    "nothing at all": ({}, {"names": []}),
    "a name twice": ({"gradient/w": ONE}, {"names": ["w", "w"]}),
    "not a number": ({"gradient/w": ONE * torch.nan}, {"names": ["w"]}),
    "infinite fisher": ({"fisher/w": ONE * torch.inf, "anchor/w": ONE.clone()}, {"names": ["w"]}),
    "integers": ({"gradient/w": ONE.int()}, {"names": ["w"]}),
    "numbers of 8 bits": ({"gradient/w": ONE.to(torch.float8_e4m3fn)}, {"names": ["w"]}),
    "versions that are a list": ({"gradient/w": ONE}, {"names": ["w"], "versions": ["2.13"]}),
    "a version that is a number": ({"gradient/w": ONE}, {"names": ["w"], "versions": {"torch": 2}}),
    "examples that are text": ({"gradient/w": ONE}, {"names": ["w"], "examples": "three"}),
    "a loss that is no number": ({"gradient/w": ONE}, {"names": ["w"], "loss": float("nan")}),
    "a loss beyond every float": ({"gradient/w": ONE}, {"names": ["w"], "loss": 10**400}),
    "an adapter that is a list": ({"gradient/w": ONE}, {"names": ["w"], "adapter": []}),
    "a base that is text": ({"gradient/w": ONE}, {"names": ["w"], "base": "llama"}),
    "a base without an id": ({"gradient/w": ONE}, {"names": ["w"], "base": {"weights": {}}}),
    "a base whose weights are text": (
        {"gradient/w": ONE},
        {"names": ["w"], "base": {"id": "", "weights": {"v": ["1"]}}},
    ),
    "a base without numbers": ({"gradient/w": ONE}, {"names": ["w"], "base": {"id": "", "weights": {"v": []}}}),
    "merged from text": ({"gradient/w": ONE}, {"names": ["w"], "merged": ["other"]}),
    "merged from what is damaged": ({"gradient/w": ONE}, {"names": ["w"], "merged": [{"versions": 1}]}),
    "nested too deep": ({"gradient/w": ONE}, {"names": ["w"], "free": nested(100)}),
    "names nested too deep": ({"gradient/w": ONE}, {"names": nested(100)}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged(tmp_path: Path, damage: str) -> None:
    tensors, metadata = DAMAGES[damage]
    path = damaged(tmp_path / "s.safetensors", tensors, {"format": 1, **metadata})
    with pytest.raises(ValueError, match=r"s\.safetensors.*(damaged|no gradient|not a readable safetensors file)"):
        SourceGradient.load(path)


@pytest.mark.parametrize("text", ["[" * 100_000 + "]" * 100_000, '{"merged":[' * 100_000 + "]}" * 100_000])
def test_metadata_nested_without_end(tmp_path: Path, text: str) -> None:
    path = tmp_path / "s.safetensors"
    header = {"gradguide": '{"format": 1, "names": ["w"], "free": ' + text + "}"}
    safetensors.torch.save_file({"gradient/w": ONE}, path, metadata=header)
    with pytest.raises(ValueError, match=r"s\.safetensors"):
        SourceGradient.load(path)


def test_one_flipped_bit_in_the_header(tmp_path: Path) -> None:
    """Each file loads or raises ``ValueError``. No flipped bit leads to another error."""
    model, x, y = softmax_problem(4)
    SourceGradient.capture(model, split(x, y, [2, 2]), cross_entropy).save(tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    path = tmp_path / "flipped.safetensors"
    random = torch.Generator().manual_seed(0)
    outcomes = {"loaded": 0, "refused": 0}
    for bit in torch.randperm(8 * length, generator=random)[:700].tolist():
        damaged = bytearray(content)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            SourceGradient.load(path)
            outcomes["loaded"] += 1
        except ValueError as error:
            assert "flipped.safetensors" in str(error)
            outcomes["refused"] += 1
    assert outcomes["refused"] > 400
    assert sum(outcomes.values()) == 700


@pytest.mark.parametrize(
    "metadata", [{"examples": "3"}, {"versions": []}, {"free": nested(70)}, {3: "x"}, {"names": []}]
)
def test_what_would_not_load_is_not_made_or_saved(tmp_path: Path, metadata: dict[Any, Any]) -> None:
    with pytest.raises(ValueError, match="metadata"):
        SourceGradient({"w": ONE}, metadata=metadata)
    source = SourceGradient({"w": ONE})
    source.metadata.update(metadata)
    with pytest.raises(ValueError, match="metadata"):
        source.save(tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []
