"""``python -m gradguide``: the command line."""

from gradguide.cli.main import run

run()
