"""The demo from start to end, and its parts for scripts that compare other methods.

    prepared = prepare(DemoConfig(seeds=3))
    outcomes = compare(prepared, {"AdamW": default_methods(2e-3)["AdamW"], "mine": make_mine})

``make_mine(model, source)`` returns a ``torch.optim.Optimizer`` over ``trainable(model)``.
"""

from __future__ import annotations

import torch

from gradguide.demo.compare import Outcome, Prepared, compare, default_methods, trainable
from gradguide.demo.config import DemoConfig, check_extras, make_out
from gradguide.demo.data import draw, few_shot, read_transfer
from gradguide.demo.model import accuracy, encode, load_encoder
from gradguide.demo.report import print_table, write_report
from gradguide.demo.source import HEAD, learn_source
from gradguide.integrations.peft import lora_parameters

__all__ = ["DemoConfig", "Outcome", "Prepared", "compare", "default_methods", "prepare", "run", "trainable"]

_SEED = 0
_TRAIN_ROWS_PER_LABEL = 32
_TEST_ROWS_PER_LABEL = 10


def run(config: DemoConfig) -> list[Outcome]:
    """Run the whole demo: compare AdamW and GradGuide, write the results and print the table.

    Raises:
        DemoError: see ``prepare``; or the output folder cannot be created.
    """
    make_out(config.out)
    prepared = prepare(config)
    outcomes = compare(prepared, default_methods(config.lr))
    paths = write_report(config.out, prepared, outcomes)
    print_table(prepared, outcomes)
    for path in paths:
        print(f"wrote {path}")
    return outcomes


def prepare(config: DemoConfig) -> Prepared:
    """Read the data, then train the source adapter and capture its source gradient.

    Raises:
        DemoError: a package, a file, a model or an option is wrong.
    """
    check_extras()
    transfer = read_transfer(config.data, target=config.target, sources=config.source)
    source_task, target_task = transfer.source, transfer.target
    shots = [few_shot(target_task, config.shots, seed) for seed in range(config.seeds)]
    encoder, tokenizer = load_encoder(config.model)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder.to(device)
    train = draw(source_task.train, _TRAIN_ROWS_PER_LABEL, _SEED)
    rows = encode(train, source_task.labels, tokenizer, device)
    model, source = learn_source(encoder, rows, len(source_task.labels), seed=_SEED)
    test = draw(source_task.test, _TEST_ROWS_PER_LABEL, _SEED)
    source_test = encode(test, source_task.labels, tokenizer, device)
    return Prepared(
        config=config,
        transfer=transfer,
        model=model,
        adapter={name: parameter.detach().clone() for name, parameter in lora_parameters(model)},
        source=source,
        shots=tuple(encode(rows, target_task.labels, tokenizer, device) for rows in shots),
        target_test=encode(target_task.test, target_task.labels, tokenizer, device),
        source_test=source_test,
        source_accuracy=accuracy(model, HEAD, source_test),
    )
