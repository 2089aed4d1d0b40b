"""Kernels that a plan measured are not run by the next one, whatever happens to their file."""

from __future__ import annotations

import json

import pytest
import timm
import torch

from lbaccel import BatchPlan
from lbaccel.launch import kernels_folder
from lbaccel.planning.candidates import Candidate
from lbaccel.planning.cost import kept_kernels, kernel_calls
from lbaccel.planning.cost.devices import CPU
from lbaccel.planning.cost.kept import name_of
from lbaccel.planning.cost.kept_kernels import KeptKernels
from lbaccel.planning.cost.update import Network, image_batch
from lbaccel.planning.estimate import Estimator

CALLS = {("aten.mm", (2, 3)): (48, -48, 24), ("aten.mm", (3, 2)): (), ("aten.bmm", 1): (8,)}


def kept(path, processor="this one", calls=()):
    found = KeptKernels(path, processor)
    for call in calls:
        found.put(call, CALLS[call])
    found.save()
    return found


def known(path, processor="this one"):
    found = KeptKernels(path, processor)
    return {call for call in CALLS if found.get(call) == CALLS[call]}


def test_what_one_process_keeps_another_has(tmp_path):
    path = tmp_path / "caches" / "kernels" / "a.json"
    assert known(path) == set() and not path.exists()
    kept(path, calls=CALLS)
    assert known(path) == set(CALLS)
    assert KeptKernels(path, "this one").get(("aten.mm", (2, 4))) is None


def test_two_processes_keep_what_both_have_measured(tmp_path):
    path = tmp_path / "a.json"
    first, second = KeptKernels(path, "this one"), KeptKernels(path, "this one")
    one, two, three = CALLS
    first.put(one, CALLS[one])
    second.put(two, CALLS[two])
    second.put(three, CALLS[three])
    first.save()
    second.save()
    assert known(path) == set(CALLS)


def test_kernels_of_another_processor_are_not_taken(tmp_path):
    path = tmp_path / "a.json"
    kept(path, calls=CALLS)
    assert known(path, "another") == set()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"form": 2}',
        '{"form": 0, "owner": "this one", "results": {}}',
        '{"form": 2, "owner": "this one", "results": []}',
        '{"form": 2, "owner": "this one", "results": 3}',
        "[" * 10_000,
        b"\xff\xfe",
    ],
)
def test_a_damaged_file_is_as_good_as_none_and_is_replaced(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert known(path) == set()
    kept(path, calls=CALLS)
    assert known(path) == set(CALLS)


@pytest.mark.parametrize("taken", [3, ["8"], [1.5], None, "8", {}, {"a": 1}])
def test_a_damaged_kernel_is_unknown(tmp_path, taken):
    path = tmp_path / "a.json"
    kept(path, calls=CALLS)
    document = json.loads(path.read_text())
    document["results"][name_of(next(iter(CALLS)))] = taken
    path.write_text(json.dumps(document))
    first, *others = CALLS
    assert KeptKernels(path, "this one").get(first) is None
    assert known(path) == set(others)


def test_a_folder_that_can_not_be_written_is_no_failure(tmp_path):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "a.json"
    kept(path, calls=CALLS)
    assert known(path) == set()


def test_a_file_that_grew_too_large_begins_anew(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    one, two, three = CALLS
    kept(path, calls=(one, two))
    monkeypatch.setattr(kept_kernels, "MOST", 2)
    fresh = KeptKernels(path, "this one")
    fresh.put(three, CALLS[three])
    fresh.save()
    assert len(json.loads(path.read_text())["results"]) <= 2


def test_the_folder_follows_the_environment(monkeypatch, tmp_path):
    assert kernels_folder() is None  # in tests: see conftest.py
    monkeypatch.delenv("LBACCEL_KERNELS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernels_folder() == tmp_path / "lbaccel" / "kernels"
    monkeypatch.setenv("LBACCEL_KERNELS", str(tmp_path / "mine"))
    assert kernels_folder() == tmp_path / "mine"


def estimates():
    """Of a network, in what is a new process for kernels."""
    kernel_calls._known_allocations.cache_clear()
    kept_kernels._kept.cache_clear()
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=10)
    network = Network(model=model, make_batch=image_batch(3, 32))
    plan = BatchPlan(global_batch_size=16, micro_batch_size=8, norm_batch_size=8)
    estimator = Estimator(network, plan, CPU, "fp32")
    return [estimator.estimate(Candidate(8, layout)) for layout in ("contiguous", "channels_last")]


@pytest.fixture
def measured(monkeypatch):
    """Kernels that run to be measured."""
    calls, allocations = [], kernel_calls.allocations
    monkeypatch.setattr(
        kernel_calls, "allocations", lambda call: (calls.append(call), allocations(call))[1]
    )
    yield calls
    kernel_calls._known_allocations.cache_clear()
    kept_kernels._kept.cache_clear()


def test_a_plan_runs_no_kernel_that_an_earlier_one_ran_and_is_the_same(
    tmp_path, monkeypatch, measured
):
    without = estimates()
    num_kernels = len(measured)
    assert num_kernels > 10
    monkeypatch.setenv("LBACCEL_KERNELS", str(tmp_path))
    assert estimates() == without and len(measured) == 2 * num_kernels
    assert estimates() == without and len(measured) == 2 * num_kernels
    (file,) = tmp_path.iterdir()
    assert len(json.loads(file.read_text())["results"]) == num_kernels


def test_another_state_of_this_process_is_another_call(tmp_path, monkeypatch, measured):
    monkeypatch.setenv("LBACCEL_KERNELS", str(tmp_path))
    estimates()
    num_kernels = len(measured)
    monkeypatch.setattr(kernel_calls, "kernel_state", lambda: "with other threads")
    estimates()
    assert len(measured) == 2 * num_kernels
