"""The command line: ``gradguide demo | capture | inspect | plot``."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TextIO

from gradguide.cli.arguments import UsageError, parser

__all__ = ["main", "run"]


# These errors have messages for users. Other errors are printed with type and location.
_EXPECTED = (UsageError, OSError, ValueError, ImportError)
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
        options = vars(parser().parse_args(argv))
        _COMMANDS[str(options.pop("command"))](options)
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
    from gradguide.demo.config import DEFAULT_MODEL, DemoConfig, LanguageConfig, OptionError, check_extras

    check_extras()
    model = options.get("model", DEFAULT_MODEL)
    if model != DEFAULT_MODEL:
        from gradguide.demo.language.model import is_causal

        if is_causal(model):
            from gradguide.demo.language.run import run as run_language

            if "source" in options:
                raise OptionError("source", f"is an option for encoders, found the causal language model {model!r}")
            run_language(LanguageConfig(**options))
            return
    if "source_file" in options:
        raise OptionError("source_file", f"is an option for causal language models, found {model!r}")
    from gradguide.demo.run import run as run_demo

    run_demo(DemoConfig(**options))


def _capture(options: dict[str, Any]) -> None:
    from gradguide.cli.capture import capture

    as_json = options.pop("json")
    found = capture(**options)
    if as_json:
        print(json.dumps(found))
    else:
        print(f"wrote {found['out']}: {found['layers']} layers from {found['tokens']:,} tokens")


def _inspect(options: dict[str, Any]) -> None:
    if options["plot"] is not None and options["adapter"] is None:
        raise UsageError("--plot draws the drift of an adapter: give one with --adapter")
    from gradguide.cli import inspect_stored, inspect_structured

    structured = inspect_structured.is_structured(options["file"])
    contents: Any = inspect_structured if structured else inspect_stored
    found = {"source": contents.describe(options["file"])}
    if options["against"] is not None:
        if inspect_structured.is_structured(options["against"]) != structured:
            kinds = ("a structured source", "another source")
            first, second = kinds if structured else reversed(kinds)
            raise ValueError(
                f"{str(options['file'])!r} holds {first}, {str(options['against'])!r} {second}: give --against a file "
                "of the same kind"
            )
        found["against"] = contents.compare(options["file"], options["against"])
    if options["adapter"] is not None:
        found["drift"] = contents.modelled_drift(options["file"], options["adapter"])
    if options["plot"] is not None:
        from gradguide.cli.picture import draw_drift

        draw_drift(found["drift"], options["plot"])
    if options["json"]:
        print(json.dumps(found, indent=2))
    else:
        from gradguide.cli import text_tables

        text_tables.show(found)


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


_COMMANDS = {"demo": _demo, "capture": _capture, "inspect": _inspect, "plot": _plot}


if __name__ == "__main__":
    run()
