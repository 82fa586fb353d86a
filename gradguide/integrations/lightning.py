"""Train with Lightning, and log GradGuide's metrics by the module's loggers.

In files of Lightning CLI, name :class:`gradguide.optim.GuidedAdamW`. In code, ``configure_optimizers`` returns a
GradGuide::

    # recipe: lightning_module.py
    import lightning
    import torch
    from lightning.pytorch.loggers import CSVLogger
    from torch.utils.data import DataLoader, TensorDataset

    from gradguide import GradGuide
    from gradguide.integrations.lightning import GradGuideCallback


    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(4, 3)

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return GradGuide(torch.optim.AdamW(self.parameters(), lr=1e-3))


    batches = DataLoader(TensorDataset(torch.randn(16, 4), torch.randint(3, (16,))), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger("logs"),  # or TensorBoardLogger, WandbLogger, MLFlowLogger
        log_every_n_steps=2,
        callbacks=[GradGuideCallback()],
    )
    trainer.fit(Module(), batches)
    print(trainer.callback_metrics["gradguide/grad_norm"])
"""

from __future__ import annotations

import math
import warnings
from typing import Any

from gradguide.factory import unwrap
from gradguide.optimizer import GradGuide

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError:  # the same classes under the name of the smaller package
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]

__all__ = ["GradGuideCallback"]


class GradGuideCallback(Callback):
    """Log the metrics of the optimizer's last step with the module's own loggers.

    Pass it as ``lightning.Trainer(callbacks=[GradGuideCallback()])``. Metrics are logged as ``gradguide/grad_norm`` and
    so on, at the steps at which Lightning logs (``log_every_n_steps``), as by ``self.log`` in the module. With several
    guided optimizers, their number follows: ``gradguide/1/grad_norm``. Metrics that are not finite are omitted. The
    cost is one transfer from the device per logging step.

    Raises:
        ValueError: at the start of training, if no optimizer is a GradGuide.

    Warns:
        UserWarning: at the start of training, if Lightning clips gradients too.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _guides(trainer):
            found = ", ".join(type(optimizer).__name__ for optimizer in trainer.optimizers) or "none"
            raise ValueError(
                f"GradGuideCallback needs a GradGuide among the module's optimizers, found {found}; return "
                "GradGuide(...) from configure_optimizers"
            )
        if trainer.gradient_clip_val:
            warnings.warn(
                f"Lightning clips gradients at gradient_clip_val={trainer.gradient_clip_val} before GradGuide receives "
                "them, which weakens them beside a source's pull: leave gradient_clip_val=None and clipping to "
                "GradGuide's Magnitude",
                UserWarning,
                stacklevel=2,
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if not trainer._logger_connector.should_update_logs:
            return
        guides = _guides(trainer)
        for index, guide in enumerate(guides):
            prefix = "gradguide" if len(guides) == 1 else f"gradguide/{index}"
            metrics = guide.metrics()
            pl_module.log_dict({f"{prefix}/{key}": value for key, value in metrics.items() if math.isfinite(value)})


def _guides(trainer: Trainer) -> list[GradGuide]:
    found = map(unwrap, trainer.optimizers)
    return [guide for guide in found if guide is not None]
