from __future__ import annotations

import ast
import math
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gradguide
from gradguide import History
from gradguide.recording.plotting import curve, draw, figure_for, save_figure, smoothed
from tests.recording.histories import history

NAN = math.nan


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Record all saved figures. The files stay empty."""
    figure = pytest.importorskip("matplotlib.figure")
    found: list[Any] = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: found.append(self))
    yield found


def test_a_curve_leaves_out_values_that_are_not_finite() -> None:
    rows = [{"a": 1.0}, {"a": NAN}, {}, {"a": math.inf}, {"a": -2.0}]
    assert curve(rows, "a") == ([1, 5], [1.0, -2.0])
    assert curve(rows, "b") == ([], [])


def test_conflicts_are_summed() -> None:
    assert curve([{"conflict": 1.0}, {"conflict": NAN}, {"conflict": 2.0}], "conflict") == ([1, 3], [1.0, 3.0])


def test_smoothing_is_a_mean_over_a_fortieth_of_the_run() -> None:
    values = [float(step % 7) for step in range(160)]
    found = smoothed(values)
    for index in range(2, 158):
        assert found[index] == pytest.approx(sum(values[index - 2 : index + 3]) / 5)
    assert found[0] == pytest.approx(sum(values[:3]) / 3)
    assert found[1] == pytest.approx(sum(values[:4]) / 4)
    assert found[-1] == pytest.approx(sum(values[-3:]) / 3)
    assert smoothed(values[:79]) == values[:79]


def test_smoothing_takes_linear_memory() -> None:
    """Each window was copied: 60,000 steps took 700 MiB and 7 seconds."""
    values = [float(step % 7) for step in range(8000)]
    tracemalloc.start()
    smoothed(values)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500 * len(values)


def test_cosines_are_smoothed_over_their_own_values(drawn: list[Any], tmp_path: Path) -> None:
    noise = [(-1.0) ** step for step in range(200)]
    rows = [{"direction_cosine": value, "source_cosine": value, "coherence": value} for value in noise]
    draw({"run": history(*rows)}, tmp_path / "runs.png")
    panels = {axes.get_title(): axes.lines for axes in drawn[0].axes if axes.lines}
    assert {title: len(lines) for title, lines in panels.items()} == {
        "cosine with the direction": 2, "cosine with the source": 2, "coherence": 1
    }  # fmt: skip
    for title in ("cosine with the direction", "cosine with the source"):
        line, values = panels[title]
        assert list(line.get_ydata()) == smoothed(noise)
        assert max(abs(value) for value in line.get_ydata()[5:-5]) < 0.3
        assert list(values.get_ydata()) == noise
        assert values.get_color() == line.get_color()
        assert values.get_alpha() < 1


def test_norms_received_guided_and_clipped_the_bound_and_the_drift_have_panels(
    drawn: list[Any], tmp_path: Path
) -> None:
    row = {"grad_norm": 8.0, "guided_norm": 4.0, "clip_factor": 0.5, "update_factor": 0.75, "source_drift": 0.01}
    draw({"run": history(row)}, tmp_path / "runs.png")
    assert {axes.get_title(): list(axes.lines[0].get_ydata()) for axes in drawn[0].axes if axes.lines} == {
        "gradient norm, as received": [8.0],
        "gradient norm, guided": [4.0],
        "gradient norm, clipped": [2.0],
        "update kept by the bound": [0.75],
        "modelled drift, nats per token": [0.01],
    }


def test_runs_are_drawn_with_their_values(drawn: list[Any], tmp_path: Path) -> None:
    first = history({"coherence": 0.5, "grad_norm": 1.0}, {"coherence": 0.25, "grad_norm": 100.0})
    second = history({"coherence": 1.0, "conflict": 1.0}, {"coherence": NAN, "conflict": 1.0})
    draw({"first": first, "second": second}, tmp_path / "runs.png")
    (figure,) = drawn
    panels = {axes.get_title(): axes for axes in figure.axes}
    lines = {
        title: {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for title, axes in panels.items()
        if axes.lines
    }
    assert lines == {
        "coherence": {"first": ([1, 2], [0.5, 0.25]), "second": ([1], [1.0])},
        "gradient norm, as received": {"first": ([1, 2], [1.0, 100.0])},
        "conflicts (cumulative)": {"second": ([1, 2], [1.0, 2.0])},
    }
    assert panels["gradient norm, as received"].get_yscale() == "log"
    assert panels["coherence"].get_yscale() == "linear"


def test_a_run_has_one_colour_in_all_panels_and_in_the_legend(drawn: list[Any], tmp_path: Path) -> None:
    """Also if runs recorded different metrics, so that no panel contains all runs."""
    runs = {
        "first": history({"coherence": 0.5}),
        "second": history({"grad_norm": 1.0}),
        "third": history({"grad_norm": 2.0, "conflict": 1.0}),
    }
    draw(runs, tmp_path / "runs.png")
    (figure,) = drawn
    (legend,) = figure.legends
    colours = {text.get_text(): line.get_color() for text, line in zip(legend.texts, legend.get_lines(), strict=True)}
    assert list(colours) == ["first", "second", "third"]
    assert len(set(colours.values())) == 3
    shown = [(line.get_label(), line.get_color()) for axes in figure.axes for line in axes.lines]
    assert len(shown) == 4
    assert all(colours[name] == colour for name, colour in shown)


def test_a_norm_of_zero_is_not_drawn_on_a_logarithmic_axis(drawn: list[Any], tmp_path: Path) -> None:
    draw({"run": history({"grad_norm": 0.0}, {"grad_norm": 1.0})}, tmp_path / "runs.png")
    assert {axes.get_yscale() for axes in drawn[0].axes} == {"linear"}


def test_empty_histories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="histories are empty"):
        draw({"run": History()}, tmp_path / "runs.png")
    assert not any(tmp_path.iterdir())


def test_a_saved_figure_has_the_asked_size_and_replaces_the_file(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "deep" / "figure.png"
    figure = figure_for(path, (3, 2), "test")
    assert not path.parent.exists()
    for dpi in (100, 50):
        save_figure(figure, path, dpi=dpi)
        assert image.imread(path).shape[:2] == (2 * dpi, 3 * dpi)
    assert [entry.name for entry in path.parent.iterdir()] == ["figure.png"]


def test_only_the_plotting_module_imports_matplotlib() -> None:
    package = Path(gradguide.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] == "matplotlib" for name in names):
                found.add(path.relative_to(package).as_posix())
    assert found == {"recording/plotting.py"}
