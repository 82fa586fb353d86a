"""Re-export what the benchmarks use of ``gradguide.demo``, so that only this file follows its changes."""

from __future__ import annotations

from gradguide.demo.compare import Coherence, unit_gradient
from gradguide.demo.config import DEFAULT_MODEL
from gradguide.demo.data import Example, Task, batches, draw, few_shot, read_file
from gradguide.demo.model import Classifier, Encoded, accuracy, add_lora, encode, load_encoder
from gradguide.demo.source import HEAD, capture_source, learn_source, sampled_label_loss

__all__ = [
    "DEFAULT_MODEL",
    "HEAD",
    "Classifier",
    "Coherence",
    "Encoded",
    "Example",
    "Task",
    "accuracy",
    "add_lora",
    "batches",
    "capture_source",
    "draw",
    "encode",
    "few_shot",
    "learn_source",
    "load_encoder",
    "read_file",
    "sampled_label_loss",
    "unit_gradient",
]
