"""A LightningModule whose every training step is one exact update of the global batch.

    from lightning_module import LargeBatchModule

    plan = BatchPlan(global_batch_size=4096, micro_batch_size=32)
    module = LargeBatchModule(model, photos, plan, lr=0.1)
    lightning.Trainer(max_epochs=10, devices=1).fit(module)

Lightning's manual optimization leaves the step to the module, and `LargeBatch.update` is that step.
One device; docs/own_loop.md says what it keeps and what it does not.
"""

import torch
from accelerate import Accelerator
from lightning import LightningModule
from torch.nn import functional as F

from lbaccel import LargeBatch, UpdateLoader


class _Epochs:
    """The updates of an epoch, from where Lightning stands; its length never changes."""

    def __init__(self, loader, step_of):
        self.loader, self.step_of = loader, step_of

    def __len__(self):
        return self.loader.stream.updates_in_epoch(0)

    def __iter__(self):
        self.loader.next_update = self.step_of()  # after a resume too
        return iter(self.loader)


class LargeBatchModule(LightningModule):
    """Any model of images and labels, trained by `LargeBatch`."""

    def __init__(self, model, train_set, plan, *, lr, clip_grad_norm=None, seed=0, num_workers=0):
        super().__init__()
        self.automatic_optimization = False
        self.model, self.plan, self.lr = model, plan, lr
        self.options = {"clip_grad_norm": clip_grad_norm, "seed": seed}
        # "keep": every epoch has as many updates, as Lightning counts them
        self.updates = UpdateLoader(
            train_set, plan, last_update="keep", seed=seed, num_workers=num_workers
        )

    def train_dataloader(self):
        return _Epochs(self.updates, lambda: self.trainer.global_step)

    def configure_optimizers(self):
        return torch.optim.SGD(self.model.parameters(), lr=self.lr, momentum=0.9)

    def on_fit_start(self):
        on_cpu = self.device.type == "cpu"
        self.large_batch = LargeBatch(Accelerator(cpu=on_cpu), self.plan, **self.options)
        optimizer = self.optimizers(use_pl_optimizer=False)
        updates = self.updates.stream.num_updates(self.trainer.max_epochs)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
        self.large_batch.prepare(self.model, optimizer, self.updates, self.schedule)

    def transfer_batch_to_device(self, batch, device, dataloader_idx):
        return batch  # `update` moves a micro-batch at a time

    def training_step(self, update, index):
        result = self.large_batch.update(update, self.loss_fn)
        steps = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        steps.increment_ready()
        steps.increment_completed()  # `global_step`, which checkpoints and `max_steps` go by
        self.log("train/loss", result.loss, batch_size=result.num_samples)

    def loss_fn(self, model, micro_batch):
        images, labels = micro_batch
        return F.cross_entropy(model(images), labels)

    def on_save_checkpoint(self, checkpoint):
        parts = (self.large_batch, self.schedule)
        checkpoint["lbaccel"] = [part.state_dict() for part in parts]

    def on_load_checkpoint(self, checkpoint):
        self.saved = checkpoint["lbaccel"]

    def on_train_start(self):
        parts = (self.large_batch, self.schedule)
        for part, state in zip(parts, getattr(self, "saved", ()), strict=False):
            part.load_state_dict(state)
