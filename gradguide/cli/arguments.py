"""Arguments of the command line."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from gradguide.utils.versions import installed_version

__all__ = ["UsageError", "parser"]


class UsageError(Exception):
    """The arguments cannot be parsed."""


class _Parser(argparse.ArgumentParser):
    """Parser that raises an exception for bad arguments, so that they print as one line like other errors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names joined by commas, found {text!r}")
    return names


def _count(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, found {text!r}")
    return int(text)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line. ``command`` is the name of the command."""
    whole = _Parser(prog="gradguide", description="Guided gradients for few-shot fine-tuning.")
    whole.add_argument(
        "--version", action="version", version=f"gradguide {installed_version('gradguide') or 'unknown'}"
    )
    commands = whole.add_subparsers(dest="command", metavar="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="adapt a pretrained model with few examples, with and without GradGuide, and compare",
        description="Trains a LoRA adapter on source domains, then adapts it to a target domain with few examples, "
        "once with AdamW and once with AdamW inside GradGuide. Reports target accuracy and source accuracy. With a "
        "causal language model, a new adapter learns the target, and the drift from the model is reported.",
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
    add(
        "--model",
        metavar="ID",
        help="hub id or folder of an encoder or a causal language model (sentence-transformers/all-MiniLM-L6-v2)",
    )
    add(
        "--source",
        type=_names,
        action="extend",
        metavar="NAME",
        help="source domains, joined by commas or repeated (first five)",
    )
    add("--target", metavar="NAME", help="target domain (last in sorted order)")
    add("--shots", type=int, metavar="N", help="training rows per target label (4)")
    add("--seeds", type=int, metavar="N", help="runs per method (4); 2 with a language model")
    add("--steps", type=int, metavar="N", help="optimizer steps per run (50); 30 with a language model")
    add("--batch", type=int, metavar="N", help="rows per step (16); 8 with a language model")
    add("--lr", type=float, metavar="RATE", help="learning rate of the adaptation (2e-3); 3e-3 with a language model")
    add("--out", type=Path, metavar="DIR", help="folder for results.csv and results.png (gradguide-demo)")
    add(
        "--source-file",
        type=Path,
        metavar="FILE",
        help="structured source of a language model: loaded if it exists, else captured and written",
    )
    capture = commands.add_parser(
        "capture",
        help="make the source file of a language model, once per base model",
        description="Captures a structured source of a causal language model, on text or on text that the model writes "
        "itself. One file serves every plain LoRA or rsLoRA adapter of the model.",
        argument_default=argparse.SUPPRESS,
    )
    add = capture.add_argument
    add("model", metavar="MODEL", help="hub id or folder of a causal language model")
    add("--out", type=Path, required=True, metavar="FILE", help="source file to write (safetensors)")
    text = capture.add_mutually_exclusive_group()
    text.add_argument("--text", type=Path, metavar="FILE", help="source text, UTF-8, one paragraph on each line")
    text.add_argument(
        "--own-text", type=_count, metavar="N", help="tokens that the model writes itself (16384, without --text)"
    )
    add("--rank", type=_count, metavar="N", help="rank of the factors (64)")
    add(
        "--modules",
        type=_names,
        action="extend",
        metavar="NAME",
        help="layers: names, endings of names or patterns, joined by commas or repeated (all linear layers)",
    )
    add("--dtype", choices=("float32", "bfloat16"), help="storage of the factors (float32)")
    add("--batch-size", type=_count, metavar="N", help="sequences per batch (8)")
    add("--length", type=_count, metavar="N", help="most tokens in a sequence (96)")
    add("--json", action="store_true", default=False, help="print the result as JSON")
    inspect = commands.add_parser(
        "inspect",
        help="print the contents of a source file, cosines with another, and the modelled drift of an adapter",
        description="Prints metadata, sizes and contents of a file written by SourceGradient.save or "
        "StructuredSource.save, by layer.",
    )
    inspect.add_argument("file", type=Path, metavar="FILE", help="source file (safetensors)")
    inspect.add_argument("--against", type=Path, metavar="FILE", help="another source file; prints cosines by layer")
    inspect.add_argument(
        "--adapter",
        type=Path,
        metavar="PATH",
        help="adapter saved by PEFT; prints its modelled drift",
    )
    inspect.add_argument("--plot", type=Path, metavar="FILE", help="image file for the drift of the adapter by layer")
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
    return whole
