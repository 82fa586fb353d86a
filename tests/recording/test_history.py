"""The history of a run: rows, files and plots."""

from __future__ import annotations

import csv
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW

from gradguide import Alignment, Direction, GradGuide, History, SourceGradient
from tests.recording.histories import history

NAN = math.nan


def same(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> bool:
    """Return whether keys, their order and values are equal. NaN equals NaN."""
    left, right = ([[(k, None if math.isnan(v) else v) for k, v in row.items()] for row in r] for r in (found, wanted))
    return left == right


def trained(steps: int) -> tuple[GradGuide, History]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    optimizer = GradGuide(AdamW(model.parameters(), lr=1e-2), direction=Direction())
    kept = History()
    optimizer.record(kept)
    for step in range(steps):
        loss = model(torch.randn(8, 4)).square().mean()
        # Step 2 is skipped.
        (loss * (torch.nan if step == 2 else 100.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, kept


def test_rows() -> None:
    kept = history({"grad_norm": 1.0}, {"grad_norm": 2.0, "update_norm": 3.0})
    assert len(kept) == 2
    assert list(kept) == kept.rows == [{"grad_norm": 1.0}, {"grad_norm": 2.0, "update_norm": 3.0}]
    assert kept.columns() == ["grad_norm", "update_norm"]


def test_clipped_norm() -> None:
    kept = history({"guided_norm": 8.0, "clip_factor": 0.25}, {"guided_norm": 8.0}, {"clip_factor": 0.5})
    assert kept.rows[0]["clipped_norm"] == 2.0
    assert "clipped_norm" not in kept.rows[1]
    assert "clipped_norm" not in kept.rows[2]


def test_append_copies() -> None:
    row = {"guided_norm": 1.0, "clip_factor": 1.0}
    kept = history(row)
    row["guided_norm"] = 5.0
    assert kept.rows[0]["guided_norm"] == 1.0
    assert "clipped_norm" not in row


def test_recorded_by_an_optimizer() -> None:
    optimizer, kept = trained(4)
    assert [row["steps"] for row in kept] == [1, 2, 2, 3]
    assert [row["skipped"] for row in kept] == [0, 0, 1, 1]
    assert math.isnan(kept.rows[2]["grad_norm"])
    assert kept.rows[0]["grad_norm"] > 1
    assert kept.rows[0]["clipped_norm"] == pytest.approx(1.0, rel=1e-6)
    last = optimizer.metrics()
    assert same([{key: kept.rows[3][key] for key in last}], [last])
    optimizer.record(None)
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert len(kept) == 4


@pytest.mark.parametrize("later", [False, True])
def test_a_history_that_gets_no_rows_gives_one_warning(later: bool) -> None:
    """With all rules off, whether they are off from the start or after ``set_alignment(None)``."""
    parameter = nn.Parameter(torch.ones(3))
    source = Alignment(SourceGradient({"a": torch.ones(3)}), on="gradient") if later else None
    optimizer = GradGuide(
        SGD([parameter], lr=0.1), direction=None, magnitude=None, alignment=source, names=[("a", parameter)]
    )
    kept = History()
    optimizer.record(kept)
    parameter.grad = torch.ones(3)
    if later:
        optimizer.step()
        optimizer.set_alignment(None)
    with pytest.warns(UserWarning, match="appends no step while all rules are off") as given:
        optimizer.step()
    assert given[0].filename == __file__
    optimizer.step()
    assert len(kept) == int(later)
    optimizer.record(None)
    optimizer.step()
    assert torch.allclose(parameter, torch.full((3,), 1 - 0.1 * (4 if later else 3)))


@pytest.mark.parametrize("wrong", ["run.csv", History, []])
def test_what_is_no_history_is_refused_before_a_step(wrong: Any) -> None:
    optimizer, kept = trained(1)
    with pytest.raises(TypeError, match="history must be a History or None, found "):
        optimizer.record(wrong)
    for parameter in optimizer.param_groups[0]["params"]:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert len(kept) == 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"run.{suffix}"
    kept = history({"grad_norm": 1.0, "steps": 1.0})
    kept.save(path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert History.load(path).rows == kept.rows


def test_a_direction_without_damping_records_the_base_alone() -> None:
    """The way out that the warning names changes no bit of the parameters."""
    parameters = [nn.Parameter(torch.linspace(-1.0, 1.0, 9)) for _ in range(2)]
    base = AdamW(parameters[:1], lr=0.01)
    optimizer = GradGuide(AdamW(parameters[1:], lr=0.01), direction=Direction(damping=0), magnitude=None)
    kept = History()
    optimizer.record(kept)
    for step in range(4):
        for parameter in parameters:
            parameter.grad = torch.arange(9.0) - step
        base.step()
        optimizer.step()
    assert torch.equal(*parameters)
    wanted = [float((torch.arange(9.0) - step).norm()) for step in range(4)]
    assert [row["grad_norm"] for row in kept] == pytest.approx(wanted)
    assert all(row["update_norm"] > 0 and row["clip_factor"] == 1 for row in kept)


@pytest.mark.parametrize("name", ["h.csv", "h.jsonl", "H.CSV", "folder/h.jsonl"])
def test_round_trip_of_a_run(tmp_path: Path, name: str) -> None:
    _, kept = trained(4)
    path = tmp_path / name
    kept.save(path)
    loaded = History.load(path)
    assert same(loaded.rows, kept.rows)
    assert loaded.columns() == kept.columns()
    loaded.save(str(path))
    assert same(History.load(str(path)).rows, kept.rows)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


FLOATS = st.floats(allow_infinity=False) | st.just(NAN) | st.sampled_from([5e-324, -0.0, 1e308, 0.1])
KEYS = st.sampled_from(["grad_norm", "source_cosine/0", "a, b", 'quote"', "ümlaut", "line\nbreak"])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.dictionaries(KEYS, FLOATS, min_size=1), min_size=1, max_size=5),
    suffix=st.sampled_from(["csv", "jsonl"]),
)
def test_round_trip_of_anything(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, float]], suffix: str
) -> None:
    kept = history(*rows)
    path = tmp_path_factory.mktemp("history") / f"h.{suffix}"
    kept.save(path)
    # A metric missing in a row was not measured.
    assert same(History.load(path).rows, [{key: row.get(key, NAN) for key in kept.columns()} for row in kept.rows])


class Counted(dict[str, float]):
    """A row that counts iterations and look-ups."""

    reads = 0

    def __iter__(self) -> Iterator[str]:
        Counted.reads += len(self)
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        Counted.reads += 1
        return super().get(key, default)


@pytest.mark.parametrize("name", ["h.csv", "h.jsonl"])
def test_work_of_saving_is_linear_in_the_rows(tmp_path: Path, name: str) -> None:
    reads = []
    for count in (10, 100):
        kept = History()
        kept.rows = [Counted(a=1.0, b=2.0, c=3.0) for _ in range(count)]
        Counted.reads = 0
        kept.save(tmp_path / name)
        reads.append(Counted.reads)
    assert reads[0] >= 30
    assert reads[1] == 10 * reads[0]


def test_empty_history_round_trip(tmp_path: Path) -> None:
    for name in ("h.csv", "h.jsonl"):
        History().save(tmp_path / name)
        assert History.load(tmp_path / name).rows == []


def test_nan_in_files_is_what_other_programs_read(tmp_path: Path) -> None:
    kept = history({"a": 1.5, "b": NAN}, {"a": NAN, "b": 2.0})
    kept.save(tmp_path / "h.csv")
    kept.save(tmp_path / "h.jsonl")
    with (tmp_path / "h.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["a", "b"], ["1.5", ""], ["", "2.0"]]
    lines = (tmp_path / "h.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 1.5, "b": None}, {"a": None, "b": 2.0}]


@pytest.mark.parametrize("name", ["h.txt", "h", "h.csv.gz", "h.json"])
def test_bad_suffix(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=r"saved as \.csv or \.jsonl, found .*h"):
        history({"a": 1.0}).save(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / name).write_text("a\n1\n")
    with pytest.raises(ValueError, match=r"no saved history: the suffix is neither \.csv nor \.jsonl"):
        History.load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("h.csv", b"a,b\n1,two\n"),
        ("h.csv", b"a\n1,2\n"),
        ("h.csv", b"\xff\xfe\x00\n\x80"),
        ("h.csv", b"a\n" + b"1" * 200_000 + b"\n"),
        ("h.jsonl", b'{"a": 1}\n{"a": '),
        ("h.jsonl", b"[1, 2]\n"),
        ("h.jsonl", b"3\n"),
        ("h.jsonl", b'{"a": "x"}\n'),
        ("h.jsonl", b'{"a": {}}\n'),
        ("h.jsonl", b'{"a": ' + b"1" * 400 + b"}\n"),
        ("h.jsonl", b'{"a": ' + b"1" * 5000 + b"}\n"),
        ("h.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"),
        ("h.jsonl", b'{"a": ' * 100_000),
        ("h.jsonl", b'"a"\n'),
        ("h.jsonl", b"null\n"),
        ("h.jsonl", b'{"a": [1]}\n'),
    ],
)
def test_files_that_hold_no_history(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}' is no saved history"):
        History.load(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "h.csv")


def test_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "h.csv"
    kept = history({"a": 1.0})
    kept.save(path)
    before = path.read_bytes()

    def torn(self: object, rows: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(csv.DictWriter, "writerows", torn)
    with pytest.raises(OSError, match="disk full"):
        history({"b": 2.0}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["h.csv"]


def test_plot_is_an_image(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    _, kept = trained(5)
    path = tmp_path / "deep" / "history.png"
    kept.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = image.imread(path)
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 400
    assert pixels[..., :3].min() < 0.5 < pixels[..., :3].max()
    assert [entry.name for entry in path.parent.iterdir()] == ["history.png"]
    blank = history({"grad_norm": NAN})
    blank.plot(tmp_path / "blank.png")
    assert (image.imread(tmp_path / "blank.png") != pixels).any()


def test_plot_draws_values_and_cumulative_conflicts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[object] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    history(
        {"conflict": 1.0, "grad_norm": 2.0, "direction_cosine": NAN},
        {"conflict": NAN, "grad_norm": 4.0, "direction_cosine": 0.5},
        {"conflict": 0.0, "grad_norm": 8.0, "direction_cosine": -0.5},
        {"conflict": 1.0, "grad_norm": NAN, "direction_cosine": 0.0},
    ).plot(tmp_path / "h.svg")
    (made,) = drawn
    lines = {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in made.axes  # type: ignore[attr-defined]
        for line in axes.lines
    }
    assert lines == {
        "conflict": ([1, 3, 4], [1, 1, 2]),
        "grad norm": ([1, 2, 3], [2, 4, 8]),
        "direction cosine": ([2, 3, 4], [0.5, -0.5, 0]),
    }


def test_plot_shows_the_bound_and_the_drift_and_cosine_of_each_source(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    drawn: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    # In the order of metrics(). The line of the worst value is drawn below those of the sources.
    row = {"update_factor": 0.5, "source_drift/a": 0.1, "source_drift/b": 0.2, "source_drift": 0.2}
    history(row | {"source_cosine/a": -0.5, "source_cosine/b": 0.5, "source_cosine": -0.5}).plot(tmp_path / "h.png")
    shown = {axes.get_title(): [line.get_label() for line in axes.lines] for axes in drawn[0].axes if axes.lines}
    assert shown == {
        "cosines": ["source cosine", "source cosine/a", "source cosine/b"],
        "update kept by the bound": ["update factor"],
        "modelled drift, nats per token": ["source drift", "source drift/a", "source drift/b"],
    }


def test_plot_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="history is empty: record"):
        History().plot(tmp_path / "h.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["figure", "fig.ure", "h.csv"])
def test_plot_bad_suffix(tmp_path: Path, name: str) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match=rf"\.png.*{name}'"):
        history({"grad_norm": 1.0}).plot(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "gradguide\[plot\]"'):
        history({"grad_norm": 1.0}).plot(tmp_path / "h.png")
