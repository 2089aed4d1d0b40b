"""Workspaces that are measured when they count: never for a survey, and with the same peaks."""

from __future__ import annotations

import timm
import torch

from lbaccel.batch.plan import BatchPlan
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost import workspace
from lbaccel.planning.cost.devices import CPU
from lbaccel.planning.cost.known_calls import fake_tensors
from lbaccel.planning.cost.later import Later, known
from lbaccel.planning.cost.trace import Allocate, Free, Kernel, Recorder, Trace
from lbaccel.planning.cost.update import Network, image_batch
from lbaccel.planning.cost.workspace import CpuWorkspaces
from lbaccel.planning.estimate import Estimator

aten = torch.ops.aten


def test_a_later_workspace_is_asked_for_once_and_is_a_part_of_the_peak():
    asked = []
    later = Later(lambda: (asked.append(1), 50)[1])
    kernel = Kernel("aten.x", 0, 0, later, None, False)
    trace = Trace([Allocate(0, 100), kernel, Free(0), Allocate(1, 120)])
    assert not asked
    assert trace.peak() == 150 and trace.breakdown()["workspace"] == 50
    assert asked == [1] and known(later) == known(50) == 50


def test_a_survey_measures_no_kernel_and_an_estimate_does(monkeypatch):
    measured = []
    plain = workspace.measured_workspace
    monkeypatch.setattr(
        workspace,
        "measured_workspace",
        lambda name, args: (measured.append(name), plain(name, args))[1],
    )
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=10)
    network = Network(model=model, make_batch=image_batch(3, 32))
    plan = BatchPlan(global_batch_size=16, micro_batch_size=4, norm_batch_size=4)
    estimator = Estimator(network, plan, CPU, "fp32")
    assert estimator.survey(4).seconds > 0 and not measured
    estimator.estimate(Candidate(4, "channels_last"))
    assert {"aten.convolution", "aten.convolution_backward"} <= set(measured)


def test_a_workspace_that_waits_keeps_no_storage_of_the_trace():
    with fake_tensors(), Recorder(CpuWorkspaces().later) as recorder:
        x, weight = torch.empty(4, 3, 8, 8), torch.empty(5, 3, 3, 3)
        y = torch.conv2d(x, weight, stride=2)
        del x, y
    (convolution,) = [k for k in recorder.trace.kernels() if k.name == "aten.convolution"]
    assert isinstance(convolution.workspace, Later)
    freed = {event.id for event in recorder.trace.events if isinstance(event, Free)}
    assert freed == {0, 2}  # x and y; the weight is there
    tensors = torch.zeros(4, 3, 8, 8), torch.zeros(5, 3, 3, 3)
    args = (*tensors, None, (2, 2), (0, 0), (1, 1), False, (0, 0), 1)
    found = CpuWorkspaces()("aten.convolution", args, {}, aten.convolution(*args))
    assert known(convolution.workspace) == found
