"""Write Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["table"]


def table(heads: Sequence[str], lines: Sequence[Sequence[str]], rule: str = "---") -> str:
    """Return a table with ``heads`` over ``lines``; ``rule`` is a cell of the line between them."""
    made = [f"| {' | '.join(cells)} |" for cells in (heads, *lines)]
    made.insert(1, f"|{'|'.join([rule] * len(heads))}|")
    return "\n".join(made)
