"""train/top1 and val/top5: each sample once, whatever the plan, an out-of-memory or a resume."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import Accelerator
from runs_of_recipe import differences, rows, run, stopped_at, whole
from torch import nn

from lbaccel import LargeBatch
from lbaccel.batch.stream import UpdateStream
from lbaccel.recipe.evaluation import evaluate
from lbaccel.runs.length import Length
from lbaccel.runs.log import RunLog
from lbaccel.runs.notices import Circumstances, LossNotices
from lbaccel.update.result import UpdateResult

NOTICES = LossNotices(Circumstances(10, 8, None, False, False, 0.1))
FEW = ("--log-every", 5)  # 12 updates: lines at 5, 10 and 12


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def top1(folder):
    return [row["train/top1"] for row in rows(folder) if "train/loss" in row]


def test_it_is_that_of_the_logits_the_updates_were_made_with(monkeypatch):
    """Counted again from what the model returned in training, update by update."""
    seen, plain = [], LargeBatch.update

    def update(self, batch, loss_fn):
        hits = [0]

        def listening(model, micro_batch):
            def forward(images):
                logits = model(images)
                hits[0] += int((logits.argmax(1) == micro_batch[1]).sum())
                return logits

            return loss_fn(forward, micro_batch)

        result = plain(self, batch, listening)
        seen.append((hits[0], batch.num_samples))
        return result

    monkeypatch.setattr(LargeBatch, "update", update)
    folder = run(*FEW, "--micro-batch-size", 48, "--drop-path", 0)
    expected = [seen[:5], seen[5:10], seen[10:]]
    assert top1(folder) == [100 * sum(h for h, _ in x) / sum(n for _, n in x) for x in expected]


def test_it_depends_on_no_micro_batch_and_survives_a_resume_within_a_line():
    expected = whole(*FEW)
    assert len(top1(expected)) == 3 and max(top1(expected)) > 0
    assert top1(run(*FEW, "--micro-batch-size", 256, output="other")) == pytest.approx(
        top1(expected), abs=0.2
    )
    folder = stopped_at(7, *FEW)
    assert len(top1(folder)) == 1
    run("--resume", folder)
    assert differences(folder, expected) == []


def test_an_update_done_again_after_memory_ran_out_counts_once(monkeypatch):
    expected = whole(*FEW, "--micro-batch-size", 64)
    forward, calls = nn.Module.__call__, [0]

    def runs_out(self, *args, **kwargs):
        if type(self).__name__ == "Tiny" and self.training and args[0].shape[0] == 128:
            calls[0] += 1
            if calls[0] == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", runs_out)
    folder = run(*FEW, "--micro-batch-size", 128)
    assert calls[0] == 2
    assert differences(folder, expected) == []


@pytest.mark.parametrize("mix", ["--mixup", "--cutmix"])
def test_mixed_samples_have_no_top1(mix):
    folder = run("--max-updates", 2, mix, 0.5)
    assert all("train/top1" not in row for row in rows(folder))
    assert "train_top1" not in json.loads((folder / "summary.json").read_text())


def log_of(log_every):
    stream = UpdateStream(10, 100)
    loader = type("Loader", (), {"stream": stream})()
    length = Length(loader, epochs=3)
    return RunLog(stream, log_every=log_every, eval_every=1, length=length, notices=NOTICES)


def result_of(update, **sums):
    return UpdateResult(True, 1.0, 1.0, 10, update, 10 * update, 5, 0, sums=sums)


def test_a_window_that_an_earlier_version_began_has_no_top1():
    """Its updates were not counted; the next line has it."""
    log = log_of(2)
    log.load_state_dict({**log.state_dict(), "window": [[1.0, 10]]})
    assert "train/top1" not in log.after_update(result_of(2, top1=4.0), lr=1, seconds=1)
    log.after_update(result_of(3, top1=4.0), lr=1, seconds=1)
    assert log.after_update(result_of(4, top1=7.0), lr=1, seconds=1)["train/top1"] == 55.0


def test_top5_counts_the_labels_among_the_five_largest_logits():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 12, generator=generator)
    labels = torch.randint(12, (40,), generator=generator)
    order = logits.argsort(1, descending=True)
    expected = 100 * sum(int(y) in row[:5].tolist() for y, row in zip(labels, order, strict=True))

    def batches(start, size):
        return (
            pair
            for pair in zip(logits[start:].split(size), labels[start:].split(size), strict=True)
        )

    found = evaluate(
        nn.Identity(),
        batches,
        Accelerator(cpu=True),
        dtype=torch.float32,
        batch_size=7,
        top5=True,
    )
    assert found["top5"] == expected / 40 and found["top1"] < found["top5"]


def test_top5_is_logged_where_there_are_more_than_ten_classes():
    folder = run("--max-updates", 1)
    assert all("val/top5" not in row for row in rows(folder))
    folder = run("--max-updates", 1, "--num-classes", 11, "--ema-decay", 0.9, output="more")
    last = rows(folder)[-1]
    assert {"val/top5", "val/top5_ema"} <= last.keys() and last["val/top5"] >= last["val/top1"]
