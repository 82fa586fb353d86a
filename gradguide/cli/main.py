"""The command line: ``gradguide demo | inspect | plot``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn, TextIO

__all__ = ["main", "run"]


class _UsageError(Exception):
    """The arguments cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    """Parser that raises an exception for bad arguments, so that they print as one line like other errors."""

    def error(self, message: str) -> NoReturn:
        raise _UsageError(f"{message} (see {self.prog} --help)")


# These errors have messages for users. Other errors are printed with type and location.
_EXPECTED = (_UsageError, OSError, ValueError, ImportError)
_INTERRUPTED = 130
_LONGEST = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name. Default: the arguments of the process.

    Returns:
        int: exit code: 0 for success or a closed pipe, 2 for an error, which is one line on stderr.
    """
    try:
        options = vars(_parser().parse_args(argv))
        {"demo": _demo, "inspect": _inspect, "plot": _plot}[str(options.pop("command"))](options)
        if sys.stdout is not None:
            sys.stdout.flush()  # raises here at a closed pipe, rather than at interpreter shutdown
    except SystemExit as end:  # --help and --version; rich, at a closed pipe
        return 0 if isinstance(end.__context__, BrokenPipeError) else int(end.code or 0)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        return 0
    except Exception as error:
        if _was_interrupted(error):
            raise KeyboardInterrupt from None
        with suppress(OSError):  # a closed stderr
            print(f"gradguide: error: {_line(error)}", file=sys.stderr, flush=True)
        return 2
    return 0


def run() -> NoReturn:
    """Run the command line and exit. After Ctrl-C the exit code is 130 and stderr is empty."""
    sys.unraisablehook = _end_if_interrupted
    try:
        code = main()
    except KeyboardInterrupt:
        code = _INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the interpreter's shutdown remains
    for stream in filter(None, (sys.stdout, sys.stderr)):
        _discard_if_closed(stream)
    sys.exit(code)


def _end_if_interrupted(unraisable: sys.UnraisableHookArgs) -> None:
    """End the process if Ctrl-C was raised in a callback that cannot raise, such as one of the import system."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        os._exit(_INTERRUPTED)
    sys.__unraisablehook__(unraisable)


def _discard_if_closed(stream: TextIO) -> None:
    """Discard buffered output that cannot be written; the interpreter would report it at shutdown."""
    try:
        stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _was_interrupted(error: BaseException | None) -> bool:
    """Return whether Ctrl-C caused an error; compiled modules turn it into an ImportError."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _line(error: Exception) -> str:
    """Return an error as one line."""
    from gradguide.demo.config import DemoError

    text = " ".join(str(error).split())
    if not isinstance(error, (*_EXPECTED, DemoError)):
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {text} ({Path(place.filename).name}, line {place.lineno})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def _demo(options: dict[str, Any]) -> None:
    # Importing the demo needs no extra. Missing packages are reported when it runs.
    from gradguide.demo.run import DemoConfig
    from gradguide.demo.run import run as run_demo

    run_demo(DemoConfig(**options))


def _inspect(options: dict[str, Any]) -> None:
    from gradguide.cli import inspect

    found = {"source": inspect.describe(options["file"])}
    if options["against"] is not None:
        found["against"] = inspect.compare(options["file"], options["against"])
    if options["adapter"] is not None:
        found["drift"] = inspect.drift(options["file"], options["adapter"])
    if options["json"]:
        print(json.dumps(found, indent=2))
    else:
        from gradguide.cli import tables

        tables.show(found)


def _plot(options: dict[str, Any]) -> None:
    from gradguide.recording.history import History
    from gradguide.recording.plotting import draw

    runs = {_run_name(path, options["history"]): History.load(path) for path in options["history"]}
    draw(runs, options["out"])
    if options["json"]:
        print(json.dumps({"out": str(options["out"]), "steps": {name: len(run) for name, run in runs.items()}}))
    else:
        print(f"wrote {options['out']}")


def _run_name(path: Path, paths: Sequence[Path]) -> str:
    """Return the file name without its suffix if it is unique, else the path."""
    return path.stem if [other.stem for other in paths].count(path.stem) == 1 else str(path)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names joined by commas, found {text!r}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gradguide", description="Guided gradients for few-shot fine-tuning.")
    parser.add_argument("--version", action="version", version=f"gradguide {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="adapt a pretrained encoder with few examples, with and without GradGuide, and compare",
        description="Trains a LoRA adapter on source domains, then adapts it to a target domain with few examples, "
        "once with AdamW and once with AdamW inside GradGuide. Reports target accuracy and source accuracy.",
        # Options that are not given are left out, so that DemoConfig is the only place with defaults.
        argument_default=argparse.SUPPRESS,
    )
    add = demo.add_argument
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="train.tsv and test.tsv: text, label, [domain] (built-in texts)",
    )
    add("--model", metavar="ID", help="hub id or folder of an encoder (sentence-transformers/all-MiniLM-L6-v2)")
    add(
        "--source",
        type=_names,
        action="extend",
        metavar="NAME",
        help="source domains, joined by commas or repeated (first five)",
    )
    add("--target", metavar="NAME", help="target domain (last in sorted order)")
    add("--shots", type=int, metavar="N", help="training rows per target label (4)")
    add("--seeds", type=int, metavar="N", help="runs per method (4)")
    add("--steps", type=int, metavar="N", help="optimizer steps per run (50)")
    add("--batch", type=int, metavar="N", help="rows per step (16)")
    add("--lr", type=float, metavar="RATE", help="learning rate of the adaptation (2e-3)")
    add("--out", type=Path, metavar="DIR", help="folder for results.csv and results.png (gradguide-demo)")
    add("--save-source", type=Path, metavar="DIR", help="save source adapter, head and source gradient to a new folder")
    add("--source-adapter", type=Path, metavar="DIR", help="load a folder of --save-source instead of training")
    inspect = commands.add_parser(
        "inspect",
        help="print the contents of a source file, cosines with another, and the drift of an adapter",
        description="Prints metadata, sizes and norms of a file written by SourceGradient.save, by layer.",
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help="source file (safetensors)")
    inspect.add_argument("--against", type=Path, metavar="FILE", help="another source file; prints cosines by layer")
    inspect.add_argument(
        "--adapter",
        type=Path,
        metavar="PATH",
        help="adapter saved by PEFT; prints its drift",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON instead of tables")
    plot = commands.add_parser(
        "plot",
        help="compare recorded runs in one figure",
        description="Draws one or more files written by History.save (.csv or .jsonl) into one figure.",
    )
    plot.add_argument("history", type=Path, nargs="+", metavar="HISTORY", help="file written by History.save")
    plot.add_argument(
        "--out", type=Path, default=Path("gradguide-plot.png"), metavar="FILE", help="image file (%(default)s)"
    )
    plot.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _version() -> str:
    try:
        return version("gradguide")
    except PackageNotFoundError:  # imported from a checkout that is not installed
        return "unknown"


if __name__ == "__main__":
    run()
