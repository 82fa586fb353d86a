"""Fill the tables of README.md and benchmarks/README.md from committed results: ``python -m benchmarks.readme``.

A table is between ``<!-- NAME: how to make its results -->`` and ``<!-- end -->``, where NAME is a key of
``blocks.BLOCKS``. ``--check`` writes nothing, and fails if a table differs from its results.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

from benchmarks.blocks import BLOCKS
from gradguide.utils.atomic import atomic_write

__all__ = ["FILES", "blocks_in", "fill", "main"]

FILES = (Path(__file__).parent.parent / "README.md", Path(__file__).parent / "README.md")

_BLOCK = re.compile(r"(?P<open><!-- (?P<name>[\w-]+): [^\n]*? -->\n)(?P<body>.*?)(?P<close><!-- end -->)", re.DOTALL)
_MARKER = re.compile(r"<!-- (?:[\w-]+: |end -->)")


def blocks_in(text: str) -> list[str]:
    """Return the names of the blocks of ``text``, in order.

    Raises:
        ValueError: a block is not closed, or an end has no block.
    """
    whole = list(_BLOCK.finditer(text))
    if any(_MARKER.search(block["body"]) for block in whole) or len(_MARKER.findall(text)) != 2 * len(whole):
        raise ValueError("every block needs <!-- NAME: ... --> and <!-- end -->, found one without the other")
    return [block["name"] for block in whole]


def fill(text: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """Return ``text`` with every block made anew.

    Raises:
        ValueError: a block is not in ``blocks``, or is not closed.
    """
    unknown = sorted(set(blocks_in(text)) - set(blocks))
    if unknown:
        raise ValueError(f"blocks must be among {', '.join(blocks)}; found {', '.join(unknown)}")
    return _BLOCK.sub(lambda block: f"{block['open']}{blocks[block['name']]()}\n{block['close']}", text)


def main(argv: list[str] | None = None, files: Sequence[Path] = FILES) -> int:
    """Fill or check ``files``; return 1 if a check fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 if a table differs from its results")
    options = parser.parse_args(argv)
    blocks = {name: cache(make) for name, make in BLOCKS.items()}  # the same block may be in both files
    failed = False
    for path in files:
        before = path.read_text(encoding="utf-8")
        try:
            after = fill(before, blocks)
        except ValueError as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        if before == after:
            continue
        if options.check:
            print(f"{path}: a table differs from its results; run python -m benchmarks.readme", file=sys.stderr)
            failed = True
        else:
            with atomic_write(path) as temporary:
                temporary.write_text(after, encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
