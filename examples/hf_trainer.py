"""Hugging Face's Trainer with lbaccel's updates: its logs, evaluation, schedule and checkpoints.

    from hf_trainer import LargeBatchTrainer

    trainer = LargeBatchTrainer(model, args, train_dataset=photos, global_batch_size=4096)
    trainer.train()

`per_device_train_batch_size` is the micro-batch. One process; docs/own_loop.md says what it keeps
and what it does not.
"""

import torch
from transformers import Trainer

from lbaccel import BatchPlan, LargeBatch, UpdateLoader


class _SteppedByTheUpdate:
    """The optimizer as the Trainer sees it: `LargeBatch.update` has stepped it already."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        """Nothing: the update was a transaction of its own."""

    def __getattr__(self, name):
        return getattr(self.optimizer, name)


class _Epochs:
    """The updates of an epoch, from where the Trainer stands."""

    def __init__(self, loader, state_of):
        self.loader, self.state_of, self.dataset = loader, state_of, loader.dataset

    def __len__(self):
        return self.loader.stream.updates_in_epoch(0)

    def __iter__(self):
        self.loader.next_update = self.state_of().global_step  # after a resume too
        return iter(self.loader)


class LargeBatchTrainer(Trainer):
    """A Trainer whose every step is one exact update of `global_batch_size` samples."""

    def __init__(self, *args, global_batch_size, norm_batch_size=None, **kwargs):
        super().__init__(*args, **kwargs)
        if self.accelerator.num_processes > 1 or self.args.n_gpu > 1:
            raise ValueError("one process: use lbaccel's own loop on several (docs/own_loop.md)")
        if self.args.gradient_accumulation_steps > 1:
            raise ValueError("gradient_accumulation_steps follows from global_batch_size")
        self.args.ignore_data_skip = True  # the loader knows where it is
        self.plan = BatchPlan(
            global_batch_size=global_batch_size,
            micro_batch_size=self.args.per_device_train_batch_size,
            norm_batch_size=norm_batch_size,
        )
        self.updates = UpdateLoader(
            self.train_dataset,
            self.plan,
            seed=self.args.seed,
            last_update="keep",  # every epoch has as many updates, as the Trainer counts
            num_workers=self.args.dataloader_num_workers,
            collate_fn=self.data_collator,
        )
        self.large_batch = None

    def get_train_dataloader(self):
        return _Epochs(self.updates, lambda: self.state)

    def get_batch_samples(self, epoch_iterator, num_batches, *device):
        update = next(epoch_iterator, None)
        return [] if update is None else [update], None

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.large_batch is None:
            self.large_batch = LargeBatch(
                self.accelerator,
                self.plan,
                clip_grad_norm=self.args.max_grad_norm or None,
                seed=self.args.seed,
            )
            _, optimizer, _ = self.large_batch.prepare(model, self.optimizer, self.updates)
            self.optimizer = _SteppedByTheUpdate(optimizer)
        model.train()
        self.result = self.large_batch.update(inputs, self.loss_and_weight)
        return torch.tensor(self.result.loss, device=self.args.device)

    def loss_and_weight(self, model, micro_batch):
        """The mean loss of a micro-batch, and the labels that it is the mean of.

        A causal language model counts `labels[..., 1:]` here.
        """
        weight = (micro_batch["labels"] != -100).sum()
        with self.compute_loss_context_manager():
            return self.compute_loss(model, micro_batch), weight

    def log(self, logs, *args, **kwargs):
        if "grad_norm" in logs:  # the Trainer looks for gradients that the update has let go
            logs["grad_norm"] = self.result.grad_norm
        super().log(logs, *args, **kwargs)

    def floating_point_ops(self, inputs):
        return 0  # would take the update apart
