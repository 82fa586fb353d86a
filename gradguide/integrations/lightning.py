"""Train with Lightning: a recipe, without code to import.

``configure_optimizers`` returns a GradGuide. :func:`gradguide.unwrap` extracts it from Lightning's wrapper::

    # recipe: lightning_module.py
    import lightning
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from gradguide import GradGuide, unwrap


    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = torch.nn.Linear(4, 3)

        def training_step(self, batch, index):
            return torch.nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def on_train_batch_end(self, *_):
            self.log("coherence", unwrap(self.optimizers()).metrics()["coherence"])

        def configure_optimizers(self):
            return GradGuide(torch.optim.AdamW(self.parameters(), lr=1e-3))


    batches = DataLoader(TensorDataset(torch.randn(16, 4), torch.randint(3, (16,))), batch_size=4)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(max_epochs=1, accelerator="cpu", **quiet)
    trainer.fit(Module(), batches)
    print(trainer.callback_metrics["coherence"])
"""
