"""The README's picture of what a step does to a gradient: ``python -m benchmarks.picture`` writes results/guidance.png.

Every arrow is what GradGuide itself does to two numbers; nothing is drawn by hand.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from gradguide import Alignment, Direction, GradGuide, Magnitude, SourceGradient
from gradguide.utils.atomic import replacing

PICTURE = Path(__file__).parent / "results" / "guidance.png"
COLOURS = {"before": "#9aa0a6", "after": "#1a73e8", "reference": "#e8710a"}


def after_steps(
    gradients: list[Tensor], start: tuple[float, float] = (0.0, 0.0), **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Last gradient as guided, running direction before it, and last update of SGD with learning rate 1; each [2]."""
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = GradGuide(torch.optim.SGD([("weight", parameter)], lr=1.0), **options)
    direction, before = torch.zeros(2), torch.zeros(2)
    for gradient in gradients:
        saved = optimizer.state_dict()["state"].get(0, {})
        direction = saved.get("gradguide.direction", direction).clone()
        before = parameter.detach().clone()
        parameter.grad = gradient.clone()
        optimizer.step()
    assert parameter.grad is not None
    return parameter.grad, direction, parameter.detach() - before


def arrow(axes: Any, vector: Tensor, kind: str, label: str) -> None:
    x, y = vector.tolist()
    style = {"arrowstyle": "-|>", "color": COLOURS[kind], "linewidth": 2.2, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=(x, y), xytext=(0, 0), arrowprops=style)
    side = 0.09 * torch.nn.functional.normalize(vector, dim=0)
    axes.text(x + float(side[0]), y + float(side[1]), label, color=COLOURS[kind], ha="center", va="center", fontsize=10)


def panel(axes: Any, title: str, text: str) -> None:
    axes.set_title(title, fontsize=11, fontweight="bold")
    axes.text(0.5, -0.03, text, transform=axes.transAxes, ha="center", va="top", fontsize=9)
    axes.set_xlim(-1.25, 1.45)
    axes.set_ylim(-1.0, 1.45)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.plot(0, 0, "o", color="black", markersize=4)


def draw_direction(axes: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    earlier = [torch.tensor([1.0, 0.15]) + 0.15 * torch.randn(2, generator=generator) for _ in range(12)]
    gradient = torch.tensor([0.55, 1.05])
    guided, direction, _ = after_steps([*earlier, gradient], direction=Direction(), magnitude=None)
    panel(
        axes,
        "direction",
        "the part of g that strays from the\nrunning direction d shrinks, as far as\nrecent gradients agree",
    )
    for previous in earlier:
        x, y = torch.nn.functional.normalize(previous, dim=0).tolist()
        axes.plot([0, x], [0, y], color=COLOURS["reference"], alpha=0.18, linewidth=1)
    arrow(axes, torch.nn.functional.normalize(direction, dim=0), "reference", "d")
    arrow(axes, gradient, "before", "g")
    arrow(axes, guided, "after", "guided")


def draw_alignment(axes: Any) -> None:
    source = torch.tensor([-0.95, 0.35])
    gradient = torch.tensor([0.75, 0.75])
    alignment = Alignment(SourceGradient({"weight": source}), weight=0.0)
    _, _, plain = after_steps([gradient], direction=None, magnitude=None)
    _, _, kept = after_steps([gradient], direction=None, magnitude=None, alignment=alignment)
    panel(
        axes,
        "alignment",
        "an update u that would raise the source\nloss (shaded) is moved to the nearest\none that does not",
    )
    normal = torch.nn.functional.normalize(source, dim=0)
    along = torch.stack([-normal[1], normal[0]])
    corners = torch.stack([3 * along, -3 * along, -3 * along + 3 * normal, 3 * along + 3 * normal])
    axes.fill(*corners.T.tolist(), color=COLOURS["reference"], alpha=0.10)
    arrow(axes, source, "reference", "source gradient s")
    arrow(axes, plain, "before", "u")
    arrow(axes, kept, "after", "corrected")


def draw_magnitude(axes: Any) -> None:
    gradient = torch.tensor([0.95, 1.0])
    clipped, _, free = after_steps([gradient], direction=None, magnitude=Magnitude(max_update=None))
    _, _, step = after_steps([gradient], direction=None, magnitude=Magnitude(max_update=0.5), start=(0.9, -0.5))
    panel(
        axes,
        "magnitude",
        "g is clipped; the update that the base\nmakes of it is at most max_update times\nas long as the parameters",
    )
    turns = torch.linspace(0, 2 * torch.pi, 200)
    axes.plot(turns.cos(), turns.sin(), "--", color=COLOURS["reference"], linewidth=1)
    arrow(axes, gradient, "before", "g")
    arrow(axes, clipped, "after", "")
    axes.text(0.98, 0.52, "clipped", color=COLOURS["after"], fontsize=10)
    arrow(axes, free, "before", "u")
    arrow(axes, step, "after", "")
    axes.text(float(step[0]) - 0.16, float(step[1]) + 0.1, "bounded", color=COLOURS["after"], fontsize=10, ha="right")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=PICTURE, help="image file (default: %(default)s)")
    options = parser.parse_args(argv)
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    for axes, draw in zip(figure.subplots(1, 3), (draw_direction, draw_alignment, draw_magnitude), strict=True):
        draw(axes)
    with replacing(options.out) as temporary:
        figure.savefig(temporary, dpi=130)


if __name__ == "__main__":
    main()
