"""All figures of the benchmarks.

``python -m benchmarks.plotting guidance`` draws what a step does to a gradient, into results/guidance.png.
``python -m benchmarks.few_shot.report`` draws the figures of the evaluation.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.utils.atomic import atomic_write

if TYPE_CHECKING:
    from benchmarks.language.frontier import Frontier

__all__ = ["accuracies", "frontiers", "guidance", "save"]

GUIDANCE = Path(__file__).parent / "results" / "guidance.png"

METHOD_COLORS = {
    "clip": "C0", "head only": "C1", "L2-SP": "C2", "EWC": "C3", "A-GEM": "C5", "GG direction+magnitude": "C7",
    "GradGuide": "black",
}  # fmt: skip
"""The methods that ``accuracies`` draws."""
AXES = {"lr": ("learning rate of the adapter", 10), "shots": ("training rows per class", 2)}
"""Label and base of the logarithmic x axis, by column."""
GUIDANCE_COLORS = {"before": "#9aa0a6", "after": "#1a73e8", "reference": "#e8710a"}


def save(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write ``figure`` to ``path``, which is replaced only once the file is complete."""
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=dpi)


def accuracies(rows: pd.DataFrame, x: str) -> Figure:
    """Draw target and source accuracy of a few-shot evaluation over ``x``, a key of ``AXES``.

    Lines are means over (set, seed). Bands are 95% intervals of what is left without the level of each set and seed.
    """
    figure = Figure(figsize=(9.0, 4.0))
    panels = figure.subplots(1, 2, sharex=True)
    rows = rows[rows["method"].isin(list(METHOD_COLORS))]
    titles = {"target_accuracy": "target accuracy, %", "source_accuracy": "source accuracy kept, %"}
    label, base = AXES[x]
    for axes, (column, title) in zip(panels, titles.items(), strict=True):
        each = rows.groupby(["method", x, "target", "seed"])[column].mean()
        level = each.groupby(["target", "seed"]).transform("mean")
        drawn = each.index.get_level_values("method")
        for method, color in METHOD_COLORS.items():
            if method not in drawn:
                continue
            mean = each[method].groupby(level=0).mean()
            spread = (each - level)[method].groupby(level=0).agg(["std", "count"])
            half = 1.96 * spread["std"] / spread["count"] ** 0.5
            axes.plot(mean.index, mean, marker="o", markersize=3, label=method, color=color)
            axes.fill_between(mean.index, mean - half, mean + half, alpha=0.12, color=color, linewidth=0)
        axes.set_xscale("log", base=base)
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def frontiers(found: Mapping[str, Mapping[str, Frontier]], cap: float, ours: str) -> Figure:
    """Draw every setting of each family of methods as a point, and its best target value within a drift as a line.

    Args:
        found: frontiers by column ("target_accuracy" in percent, "target_loss" in nats) and family.
        cap: largest drift drawn, in nats per token.
        ours: the family that is drawn in black.
    """
    figure = Figure(figsize=(6.0 * len(found), 5.0))
    titles = {"target_accuracy": "target accuracy, %", "target_loss": "target loss, nats per label"}
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    names = list(dict.fromkeys(name for families in found.values() for name in families))
    for axes, (column, families) in zip(panels, found.items(), strict=True):
        better = min if column == "target_loss" else max
        for index, name in enumerate(names):
            if name not in families:
                continue
            points = families[name].points.sort_values("drift")
            points = points[points["drift"] <= cap]
            best = [families[name].start]
            for value in points["value"]:
                best.append(better(best[-1], value))
            style = {"color": "black", "linewidth": 2.2} if name == ours else {"color": f"C{index % 10}"}
            style["linestyle"] = ("-", "--", ":")[index // 10 % 3]
            axes.step([0.0, *points["drift"], cap], [*best, best[-1]], where="post", label=name, **style)
            axes.plot(points["drift"], points["value"], "o", markersize=3, color=style["color"])
        if column == "target_loss":
            axes.set_ylim(top=3.0)
        axes.set_xlim(0.0, cap)
        axes.set_xlabel("drift, nats per token")
        axes.set_title(titles[column], fontsize=10)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.05 + 0.035 * (-(-len(labels) // 5)), 1, 1))
    return figure


def guidance() -> Figure:
    """Draw what direction, alignment and magnitude do to a gradient. Every arrow is computed by GradGuide."""
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 3), (_direction, _alignment, _magnitude), strict=True):
        draw(axes)
    return figure


def _direction(axes: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    earlier = [torch.tensor([1.0, 0.15]) + 0.15 * torch.randn(2, generator=generator) for _ in range(12)]
    gradient = torch.tensor([0.55, 1.05])
    guided, direction, _ = _after_steps([*earlier, gradient], direction=Direction(), magnitude=None)
    _panel(
        axes,
        "direction",
        "the part of g that strays from the\nrunning direction d shrinks, as far as\nrecent gradients agree",
    )
    for previous in earlier:
        x, y = normalize(previous, dim=0).tolist()
        axes.plot([0, x], [0, y], color=GUIDANCE_COLORS["reference"], alpha=0.18, linewidth=1)
    _arrow(axes, normalize(direction, dim=0), "reference", "d")
    _arrow(axes, gradient, "before", "g")
    _arrow(axes, guided, "after", "guided")


def _alignment(axes: Any) -> None:
    source = torch.tensor([-0.95, 0.35])
    gradient = torch.tensor([0.75, 0.75])
    alignment = Alignment(SourceGradient({"weight": source}), weight=0.0)
    _, _, plain = _after_steps([gradient], direction=None, magnitude=None)
    _, _, kept = _after_steps([gradient], direction=None, magnitude=None, alignment=alignment)
    _panel(
        axes,
        "alignment",
        "an update u that would raise the source\nloss (shaded) is moved to the nearest\none that does not",
    )
    normal = normalize(source, dim=0)
    along = torch.stack([-normal[1], normal[0]])
    corners = torch.stack([3 * along, -3 * along, -3 * along + 3 * normal, 3 * along + 3 * normal])
    axes.fill(*corners.T.tolist(), color=GUIDANCE_COLORS["reference"], alpha=0.10)
    _arrow(axes, source, "reference", "source gradient s")
    _arrow(axes, plain, "before", "u")
    _arrow(axes, kept, "after", "corrected")


def _magnitude(axes: Any) -> None:
    gradient = torch.tensor([0.95, 1.0])
    clipped, _, free = _after_steps([gradient], direction=None, magnitude=Magnitude(max_update=None))
    _, _, step = _after_steps([gradient], direction=None, magnitude=Magnitude(max_update=0.5), start=(0.9, -0.5))
    _panel(
        axes,
        "magnitude",
        "g is clipped; the update that the base\nmakes of it is at most max_update times\nas long as the parameters",
    )
    turns = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(turns.cos(), turns.sin(), "--", color=GUIDANCE_COLORS["reference"], linewidth=1)
    after = GUIDANCE_COLORS["after"]
    _arrow(axes, gradient, "before", "g")
    _arrow(axes, clipped, "after", "")
    axes.text(0.98, 0.52, "clipped", color=after, fontsize=10)
    _arrow(axes, free, "before", "u")
    _arrow(axes, step, "after", "")
    axes.text(float(step[0]) - 0.16, float(step[1]) + 0.1, "bounded", color=after, fontsize=10, ha="right")


def _after_steps(
    gradients: list[Tensor], start: tuple[float, float] = (0.0, 0.0), **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last gradient as guided, the direction before it, and the last update of SGD at rate 1; each [2]."""
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = GradGuide(torch.optim.SGD([("weight", parameter)], lr=1.0), **options)
    direction, before = torch.zeros(2), torch.zeros(2)
    for gradient in gradients:
        state: Mapping[str, Tensor] = optimizer.state_dict()["state"].get(0, {})
        direction = state.get("gradguide.direction", direction).clone()
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
    assert parameter.grad is not None
    return parameter.grad, direction, parameter.detach() - before


def _arrow(axes: Any, vector: Tensor, kind: str, label: str) -> None:
    x, y = vector.tolist()
    color = GUIDANCE_COLORS[kind]
    style = {"arrowstyle": "-|>", "color": color, "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(x, y), xytext=(0, 0), arrowprops=style)
    side = 0.09 * normalize(vector, dim=0)
    axes.text(x + float(side[0]), y + float(side[1]), label, color=color, ha="center", va="center", fontsize=10)


def _panel(axes: Any, title: str, text: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold")
    axes.text(0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=9)
    axes.set_xlim(-1.25, 1.45)
    axes.set_ylim(-1.0, 1.45)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.plot(0, 0, "o", color="black", markersize=4)


def main(argv: list[str] | None = None) -> None:
    """Draw one figure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plotting", description=__doc__)
    parser.add_argument("figure", choices=["guidance"], help="what a step does to a gradient")
    parser.add_argument("--out", type=Path, default=GUIDANCE, help="image file (default: %(default)s)")
    save(guidance(), parser.parse_args(argv).out, dpi=130)


if __name__ == "__main__":
    main()
