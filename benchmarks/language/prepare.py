"""Make a model folder from a GGUF file: ``python -m benchmarks.language.prepare FILE.gguf --model FOLDER``.

Needs the package ``gguf``. The weights are dequantised to float32.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch


def prepare(file: Path, folder: Path) -> None:
    """Write model and tokenizer of ``file`` to ``folder``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {}
    try:
        from transformers import GgufConfig  # transformers >= 5.20; without it, weights are always dequantised
    except ImportError:
        pass
    else:
        options["quantization_config"] = GgufConfig(dequantize=True, gguf_file=file.name)
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **options)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.language.prepare", description=__doc__)
    parser.add_argument("file", type=Path, help="a GGUF file")
    parser.add_argument("--model", type=Path, required=True, help="folder to write")
    options = parser.parse_args(argv)
    if not options.file.is_file():
        parser.error(f"FILE must be an existing GGUF file, found {str(options.file)!r}")
    prepare(options.file, options.model)
    print(f"wrote {options.model}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
