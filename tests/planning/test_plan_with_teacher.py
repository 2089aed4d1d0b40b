"""A plan that counts a teacher: its weights on each rank, and its forward where it is the peak."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from judging import photos_and_run
from torch import nn

from lbaccel import InputError, plan
from lbaccel.batch.plan import BatchPlan
from lbaccel.cli import main
from lbaccel.planning.cost.devices import GIB
from lbaccel.planning.cost.trace import Allocate, Free
from lbaccel.planning.cost.update import Network, image_batch, trace_update

SIZE = 32
FIXED = {
    "img_size": SIZE,
    "global_batch_size": 64,
    "num_classes": 10,
    "device": "cpu",
    "memory": "4GiB",
    "micro_batch_size": 16,
    "norm_batch_size": 16,
    "activation_checkpointing": "none",
    "memory_format": "contiguous",
    "compare": False,
}


def bytes_of(model):
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.fixture(scope="module")
def teacher():
    return timm.create_model("test_resnet", num_classes=10)


def test_the_weights_of_the_teacher_are_a_part_of_the_peak(teacher):
    alone, taught = plan("resnet10t", **FIXED), plan("resnet10t", teacher=teacher, **FIXED)
    assert "teacher" not in alone.breakdown
    assert round(taught.breakdown["teacher"] * GIB) == bytes_of(teacher)
    added = round((taught.predicted_peak_gib - alone.predicted_peak_gib) * GIB)
    logits = 16 * 10 * 4
    assert bytes_of(teacher) <= added <= bytes_of(teacher) + 12 * logits
    assert taught.predicted_seconds_per_update > alone.predicted_seconds_per_update


class Wide(nn.Module):
    """A teacher of few weights whose forward holds two tensors of 64 channels."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))


def test_a_forward_of_the_teacher_that_is_the_peak_is_counted():
    """A student without activations of note: what is live at the peak is the teacher's own."""
    student = nn.Sequential(nn.AvgPool2d(SIZE), nn.Flatten(), nn.Linear(3, 10))
    teacher = Wide()
    trace = trace_update(
        Network(model=student, make_batch=image_batch(3, SIZE), teacher=teacher),
        BatchPlan(global_batch_size=32, micro_batch_size=16),
    )
    map_bytes = 16 * 64 * SIZE * SIZE * 4
    images = 16 * 3 * SIZE * SIZE * 4
    least = bytes_of(teacher) + images + 2 * map_bytes  # the map and its relu
    assert least <= trace.peak() <= least + bytes_of(student) * 2 + 20_000
    large = {e.id for e in trace.events if isinstance(e, Allocate) and e.num_bytes == map_bytes}
    freed = {e.id for e in trace.events if isinstance(e, Free)}
    assert len(large) == 4 and large <= freed  # nothing is kept for a backward pass


def test_each_rank_holds_the_whole_teacher_under_zero(teacher):
    for stage in (1, 3):
        found = plan("resnet10t", teacher=teacher, world_size=2, zero_stage=stage, **FIXED)
        assert round(found.breakdown["teacher"] * GIB) == bytes_of(teacher)
        assert found.predicted_peak_gib == pytest.approx(sum(found.breakdown.values()))


def test_a_budget_below_both_networks_names_the_teacher(teacher):
    small = bytes_of(timm.create_model("test_resnet", num_classes=10)) + 1000
    with pytest.raises(InputError, match="is below the weights of test_resnet and its teacher"):
        plan("test_resnet", teacher=teacher, **FIXED | {"memory": small})


def test_a_teacher_beside_a_loss_of_ones_own_is_refused(teacher):
    with pytest.raises(InputError, match="teacher= with loss_fn="):
        plan("resnet10t", teacher=teacher, loss_fn=lambda m, b: m(b[0]).mean(), **FIXED)


def test_a_teacher_of_other_outputs_is_refused(teacher):
    other = teacher.num_classes + 3
    with pytest.raises(InputError, match=f"Use num_classes={teacher.num_classes} "):
        plan("resnet10t", teacher=teacher, **{**FIXED, "num_classes": other})


def test_the_model_and_the_teacher_stay_as_they_are(teacher):
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    teacher.train()
    plan("resnet10t", teacher=teacher, precision="bf16", **FIXED)
    assert teacher.training and all(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_the_command_line_counts_it(capsys):
    run = photos_and_run()[1]
    capsys.readouterr()  # of the run
    flags = "plan --model lbaccel_tiny --img-size 8 --global-batch-size 32 --num-classes 3"
    flags = [*flags.split(), "--device", "cpu", "--memory", "1GiB", "--json"]
    assert main([*flags, "--teacher", str(run)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["breakdown"]["teacher"] > 0
    assert main([*flags, "--teacher", str(run), "--report", "r.json"]) == 2
    assert "--report measures a network without a teacher" in capsys.readouterr().err
    assert main([*flags, "--teacher", "nowhere"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
