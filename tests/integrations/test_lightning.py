"""Log metrics with Lightning's loggers and Trainer's reporters, and read them back."""

from __future__ import annotations

import csv
import math
import os
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradguide
from gradguide import Direction, GradGuide, Magnitude
from tests.integrations.reads import count_reads

lightning = pytest.importorskip("lightning")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from gradguide.integrations.lightning import GradGuideCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

KEY = "gradguide/coherence"


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    """A linear classifier that keeps the metrics of each step."""

    def __init__(self, guides: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 3)
        self.guides = guides
        self.seen: list[dict[str, float]] = []
        self.automatic_optimization = guides == 1

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.trainer.optimizers[0].metrics())

    def configure_optimizers(self) -> Any:
        def guide(parameters: Any) -> GradGuide:
            return GradGuide(torch.optim.SGD(parameters, lr=0.1), direction=Direction(decay=0.8))

        made: list[Any] = [guide(self.net.parameters())] if self.guides < 2 else [guide([p]) for p in self.parameters()]
        return made if self.guides else torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module: Module, logger: Any, every: int = 1, **options: Any) -> Any:
    torch.manual_seed(1)
    rows = TensorDataset(torch.randn(24, 4), torch.randint(3, (24,)))
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=logger,
        log_every_n_steps=every,
        callbacks=[GradGuideCallback()],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        **options,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    return trainer


def read_csv(folder: Path, key: str) -> list[float]:
    (file,) = folder.rglob("metrics.csv")
    with file.open(encoding="utf-8") as lines:
        return [float(row[key]) for row in csv.DictReader(lines) if row.get(key)]


@pytest.mark.parametrize(("every", "accumulate", "steps"), [(1, 1, range(6)), (2, 1, [1, 3, 5]), (1, 2, [1, 3, 5])])
def test_metrics_reach_the_logger_at_its_steps(tmp_path: Path, every: int, accumulate: int, steps: Any) -> None:
    module = Module()
    fit(module, CSVLogger(tmp_path), every, accumulate_grad_batches=accumulate)
    assert read_csv(tmp_path, KEY) == pytest.approx([module.seen[step]["coherence"] for step in steps], rel=1e-6)
    counts = [(step + 1) // accumulate for step in steps]
    assert read_csv(tmp_path, "gradguide/steps") == counts


def test_what_was_not_measured_is_left_out_and_the_last_values_are_callback_metrics(tmp_path: Path) -> None:
    module = Module()
    trainer = fit(module, CSVLogger(tmp_path))
    assert math.isnan(module.seen[0]["source_cosine"])
    assert "gradguide/source_cosine" not in trainer.callback_metrics
    assert trainer.callback_metrics[KEY].item() == pytest.approx(module.seen[-1]["coherence"])


def test_metrics_are_read_at_logging_steps_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Module()
    monkeypatch.setattr(module, "on_train_batch_end", lambda *_: None)
    read = count_reads(monkeypatch)
    fit(module, CSVLogger(tmp_path), every=3)
    assert len(read) == 2


def test_several_guided_optimizers_are_numbered(tmp_path: Path) -> None:
    module = Module(guides=2)
    fit(module, CSVLogger(tmp_path))
    assert read_csv(tmp_path, "gradguide/0/steps") == read_csv(tmp_path, "gradguide/1/steps") == [1, 2, 3, 4, 5, 6]


def test_another_optimizer_is_refused_before_the_first_step(tmp_path: Path) -> None:
    module = Module(guides=0)
    with pytest.raises(ValueError, match="among the module's optimizers, found SGD; return GradGuide"):
        fit(module, CSVLogger(tmp_path))
    assert module.seen == []


@pytest.mark.parametrize(("limit", "count"), [(None, 0), (0.5, 1)])
def test_it_warns_if_lightning_clips_too(tmp_path: Path, limit: float | None, count: int) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fit(Module(), CSVLogger(tmp_path), gradient_clip_val=limit)
    assert len([w for w in found if "gradient_clip_val" in str(w.message)]) == count


@pytest.mark.slow
@pytest.mark.parametrize("present", ["lightning", "pytorch_lightning"])
def test_it_is_a_callback_of_the_package_that_is_installed(present: str) -> None:
    pytest.importorskip(present)
    absent = ({"lightning", "pytorch_lightning"} - {present}).pop()
    code = (
        f"import sys; sys.modules[{absent!r}] = None\n"
        "from gradguide.integrations.lightning import GradGuideCallback\n"
        "print(GradGuideCallback.__mro__[1].__module__)"
    )
    root = str(Path(gradguide.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split()[-1].startswith(f"{present}.")


def tensorboard(folder: Path, key: str) -> list[float]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: list[float] = []
    for file in folder.rglob("events.out.tfevents*"):
        events = accumulator.EventAccumulator(str(file))
        events.Reload()
        found += [event.value for event in events.Scalars(key)] if key in events.Tags()["scalars"] else []
    return found


def wandb(folder: Path, key: str) -> list[float]:
    """Read a run's offline file: records in LevelDB's log format, after a header of 7 bytes."""
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (file,) = folder.rglob("*.wandb")
    data, at, whole, found = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15  # bytes of the block; fewer than a record's header are padding
        if left < 7:
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            record = proto.Record.FromString(whole)
            items = [(item.key or "/".join(item.nested_key), item.value_json) for item in record.history.item]
            found += [float(value) for name, value in items if name == key]
            whole = b""
    return found


def mlflow(folder: Path, key: str) -> list[float]:
    client = pytest.importorskip("mlflow").MlflowClient(f"file:{folder}/mlruns")
    (run,) = [run for each in client.search_experiments() for run in client.search_runs([each.experiment_id])]
    return [metric.value for metric in client.get_metric_history(run.info.run_id, key)]


READERS: dict[str, Callable[[Path, str], list[float]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder to which all loggers write."""
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    # An earlier test may have chosen another folder, for the whole process.
    if "mlflow" in sys.modules:
        sys.modules["mlflow"].set_tracking_uri(None)
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()
    return tmp_path


def finish(name: str) -> None:
    """Write the files whole: another process of wandb writes them."""
    if name == "wandb":
        sys.modules["wandb"].finish()
        sys.modules["wandb"].teardown()


@pytest.mark.parametrize("name", READERS)
def test_metrics_arrive_with_lightning_s_logger(folder: Path, name: str) -> None:
    pytest.importorskip(name)
    made = {"tensorboard": "TensorBoardLogger", "wandb": "WandbLogger", "mlflow": "MLFlowLogger"}
    kind = getattr(lightning.pytorch.loggers, made[name])
    options: dict[str, dict[str, Any]] = {"tensorboard": {"save_dir": folder}, "wandb": {"offline": True}}
    logger = kind(**options.get(name, {}))
    module = Module()
    fit(module, logger)
    finish(name)
    wanted = [seen["coherence"] for seen in module.seen]
    assert len(wanted) == 6
    assert READERS[name](folder, KEY) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", READERS)
def test_metrics_arrive_with_trainer_s_reporter(folder: Path, name: str) -> None:
    pytest.importorskip(name)
    transformers = pytest.importorskip("transformers")
    from gradguide.integrations.transformers import guide
    from tests.contract.test_trainer import bert, texts

    arguments = transformers.TrainingArguments(
        str(folder / "output"), max_steps=3, logging_steps=1, report_to=[name], use_cpu=True, disable_tqdm=True,
        save_strategy="no",
    )  # fmt: skip
    trainer = transformers.Trainer(bert(), arguments, train_dataset=texts())
    guide(trainer, magnitude=Magnitude())
    trainer.train()
    finish(name)
    wanted = [row[KEY] for row in trainer.state.log_history if KEY in row]
    assert len(wanted) == 3
    key = KEY if name == "mlflow" else f"train/{KEY}"
    assert READERS[name](folder, key) == pytest.approx(wanted, rel=1e-5)
