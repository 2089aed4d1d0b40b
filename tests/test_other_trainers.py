"""The examples for Hugging Face's Trainer and for Lightning train as lbaccel's own loop does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from lbaccel import BatchPlan, LargeBatch, UpdateLoader

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # theirs
PLAN = BatchPlan(global_batch_size=8, micro_batch_size=4, norm_batch_size=4)
UPDATES = 9  # 3 epochs of 8, 8 and 6 samples


class Photos(Dataset):
    """Samples with random augmentation, as mappings or as pairs."""

    def __init__(self, *, mappings):
        generator = torch.Generator().manual_seed(0)
        self.pixels, self.mappings = torch.randn(22, 6, generator=generator), mappings

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        pixels, label = self.pixels[index] + 0.1 * torch.randn(6), index % 3
        return {"pixel_values": pixels, "labels": label} if self.mappings else (pixels, label)


class Network(nn.Module):
    """BatchNorm and dropout; called as Hugging Face's models are, or with images alone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.2))
        self.head = nn.Linear(16, 3)

    def forward(self, pixel_values, labels=None):
        logits = self.head(self.body(pixel_values))
        return logits if labels is None else {"loss": F.cross_entropy(logits, labels)}


def own_loop(optimizer_of, scheduler_of, loss_fn, *, mappings, collate_fn=None):
    """The weights and buffers that lbaccel's own loop leaves."""
    model = Network()
    optimizer = optimizer_of(model)
    how = {"seed": 3, "last_update": "keep", "collate_fn": collate_fn}
    loader = UpdateLoader(Photos(mappings=mappings), PLAN, **how)
    scheduler = scheduler_of(optimizer)
    large_batch = LargeBatch(Accelerator(cpu=True), PLAN, clip_grad_norm=0.5, seed=3)
    large_batch.prepare(model, optimizer, loader, scheduler)
    for _ in range(3):
        for update in loader:
            large_batch.update(update, loss_fn)
    assert large_batch.num_updates == UPDATES
    return model.state_dict()


def assert_equal(found, truth):
    assert found.keys() == truth.keys()
    assert all(torch.equal(value, truth[name]) for name, value in found.items())
    assert not torch.equal(found["head.weight"], Network().head.weight)


def hugging_faces(folder, *, resume=None, **more):
    transformers = pytest.importorskip("transformers")
    from hf_trainer import LargeBatchTrainer

    arguments = transformers.TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=4, num_train_epochs=3, seed=3,
        learning_rate=0.01, max_grad_norm=0.5, weight_decay=0.1, save_steps=4, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, **more,
    )  # fmt: skip
    data = Photos(mappings=True)
    sizes = {"global_batch_size": 8, "norm_batch_size": 4}
    trainer = LargeBatchTrainer(Network(), arguments, train_dataset=data, **sizes)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_hugging_faces_trainer_trains_to_the_bit_as_lbaccels_own_loop(tmp_path):
    trainer = hugging_faces(tmp_path)
    from transformers import Trainer, get_scheduler

    def optimizer_of(model):
        decayed = trainer.get_decay_parameter_names(model)
        kind, options = Trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
        named = dict(model.named_parameters())
        groups = [
            {"params": [named[n] for n in named if n in decayed], "weight_decay": 0.1},
            {"params": [named[n] for n in named if n not in decayed], "weight_decay": 0.0},
        ]
        return kind(groups, **options)

    truth = own_loop(
        optimizer_of,
        lambda o: get_scheduler("linear", o, num_warmup_steps=0, num_training_steps=UPDATES),
        lambda model, data: model(**data)["loss"],
        mappings=True,
        collate_fn=trainer.data_collator,
    )
    assert_equal(trainer.model.state_dict(), truth)
    logged = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, UPDATES + 1))
    assert all(line["grad_norm"] > 0 for line in logged)


def test_hugging_faces_trainer_goes_on_in_the_middle_of_an_epoch_to_the_bit(tmp_path):
    whole = hugging_faces(tmp_path)
    resumed = hugging_faces(tmp_path, resume=str(tmp_path / "checkpoint-4"))
    assert_equal(resumed.model.state_dict(), whole.model.state_dict())


def test_hugging_faces_trainer_refuses_an_accumulation_of_its_own(tmp_path):
    with pytest.raises(ValueError, match="follows from global_batch_size"):
        hugging_faces(tmp_path, gradient_accumulation_steps=2)


def lightnings(folder, *, resume=None):
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning_module import LargeBatchModule

    module = LargeBatchModule(
        Network(), Photos(mappings=False), PLAN, lr=0.1, clip_grad_norm=0.5, seed=3
    )
    saves = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=4, filename="{step}")
    trainer = lightning.Trainer(
        max_epochs=3, devices=1, accelerator="cpu", logger=False, callbacks=[saves],
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, ckpt_path=resume)
    assert trainer.global_step == module.large_batch.num_updates == UPDATES
    return module.model.state_dict()


def test_lightning_trains_and_goes_on_to_the_bit_as_lbaccels_own_loop(tmp_path):
    truth = own_loop(
        lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, UPDATES),
        lambda model, data: F.cross_entropy(model(data[0]), data[1]),
        mappings=False,
    )
    assert_equal(lightnings(tmp_path), truth)
    (middle,) = tmp_path.glob("step=4*.ckpt")
    assert_equal(lightnings(tmp_path / "resumed", resume=middle), truth)
