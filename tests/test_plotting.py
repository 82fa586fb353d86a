"""Figures show the numbers of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plotting
from benchmarks.few_shot.grid import LRS
from benchmarks.few_shot.methods import METHODS
from tests.few_shot.known import OURS, results


def test_lines_are_means_over_sets_and_seeds_and_bands_leave_their_level_out() -> None:
    rows = results()
    figure = plotting.accuracies(rows, "lr")
    target: Any = figure.axes[0]
    lines = {line.get_label(): line for line in target.get_lines()}
    assert set(lines) == {"clip", OURS}
    expected = rows[rows["method"] == OURS].groupby("lr")["target_accuracy"].mean()
    np.testing.assert_allclose(lines[OURS].get_ydata(), expected)
    assert list(lines[OURS].get_xdata()) == list(LRS)
    assert target.get_xscale() == "log"
    assert len(target.collections) == 2


def test_every_method_that_is_drawn_exists() -> None:
    assert set(plotting.METHOD_COLORS) <= set(METHODS)


def test_the_figure_is_written_from_the_command_line(tmp_path: Path) -> None:
    plotting.main(["guidance", "--out", str(tmp_path / "guidance.png")])
    assert (tmp_path / "guidance.png").read_bytes().startswith(b"\x89PNG")


def test_the_arrows_are_what_a_step_does() -> None:
    panels: list[Any] = plotting.guidance().axes
    tips = {axes.get_title(): [a.xy for a in axes.texts if hasattr(a, "arrow_patch")] for axes in panels}
    assert list(tips) == ["direction", "alignment", "magnitude"]
    d, g, guided = (np.array(tip) for tip in tips["direction"])
    assert np.dot(guided, d) == pytest.approx(np.dot(g, d), abs=1e-4)  # the part along d stays
    assert np.linalg.norm(guided) < np.linalg.norm(g)
    s, _, corrected = (np.array(tip) for tip in tips["alignment"])
    assert np.dot(corrected, s) == pytest.approx(0.0, abs=1e-4)
    clipped, bounded = (np.linalg.norm(tips["magnitude"][i]) for i in (1, 3))
    assert clipped == pytest.approx(1.0, abs=1e-4)
    assert bounded == pytest.approx(0.5 * np.linalg.norm([0.9, -0.5]), abs=1e-3)
