"""``python -m gradguide``: the command line."""

from gradguide.cli import run

run()
