"""Run programs by hand: ``python -m tests.programs FIRST [LAST]``. One alone is printed, as small as it still fails."""

from __future__ import annotations

import sys

from tests.programs.compare import Disagreement, Tally
from tests.programs.generator import generate
from tests.programs.program import listing
from tests.programs.run import run
from tests.programs.shrink import shrink


def main() -> None:
    """Run the programs of the seeds from the first argument up to the second."""
    first, last = int(sys.argv[1]), int(sys.argv[-1])
    tally, failed = Tally(), 0
    for seed in range(first, last + 1):
        program = generate(seed)
        try:
            run(program, tally)
        except Disagreement as error:
            failed += 1
            print(f"{seed}: {error}"[:600])
            if first == last:
                print(listing(shrink(program)))
    print(f"{failed} of {last + 1 - first} disagree; {tally.undecided} of {tally.compared} vectors undecided")


if __name__ == "__main__":
    main()
