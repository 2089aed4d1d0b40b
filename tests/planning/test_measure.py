"""What a plan really costs on the CPU, beside what it predicts; and the report that has both."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from lbaccel import cli
from lbaccel.errors import InputError, RunFailed
from lbaccel.models import create_backbone
from lbaccel.planning import measure as module
from lbaccel.planning.cost.devices import CARDS
from lbaccel.planning.cost.processor import instruction_set
from lbaccel.planning.measure import measure, predicted_peaks
from lbaccel.planning.network import random_images
from lbaccel.planning.planner import plan
from lbaccel.planning.report import as_report

pytestmark = pytest.mark.usefixtures("shared_traces")

PX = 64
CONTRACT = {"img_size": PX, "num_classes": 10, "memory": "1GiB", "device": "cpu", "compare": False}
FLAGS = "--model resnet10t --img-size 64 --num-classes 10 --global-batch-size 64 --memory 1GiB"
FLAGS = [*FLAGS.split(), "--micro-batch-size", "32"]


def planned(**options):
    given = {"global_batch_size": 64, "micro_batch_size": 32, **CONTRACT, **options}
    return plan("resnet10t", **given)


def assert_within_margin(measured, found):
    """No plan above its budget: the margin is for what lies above the trace, on either side."""
    margin = found.workspaces.margin_gib
    assert 0 <= found.predicted_peak_gib - measured.peak_allocated_gib <= 2 * margin + 64 / 2**30


@pytest.fixture(scope="module")
def network():
    return create_backbone("resnet10t", num_classes=10)


@pytest.mark.parametrize(
    "options",
    [
        {"memory_format": "contiguous"},
        {"memory_format": "channels_last", "optimizer": "adamw"},
        {"activation_checkpointing": "full", "norm_batch_size": 16},
        {"precision": "bf16", "activation_checkpointing": "none"},
        {"global_batch_size": 32},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_measured_peak_is_below_the_predicted_one_and_at_most_its_margin_below(
    options, network
):
    found = planned(**options)
    measured = measure(found, network, random_images(3, PX), optimizer=found.optimizer)
    predicted, reserved = predicted_peaks(found)
    assert_within_margin(measured, found)
    assert predicted == found.predicted_peak_gib
    assert reserved is None and measured.peak_reserved_gib is None
    assert measured.num_micro_steps == min(2, found.gradient_accumulation_steps)
    assert measured.seconds_per_micro_step > 0 and measured.commit_seconds > 0


def test_segments_are_recomputed_as_the_plan_has_them(network):
    plain = planned(norm_batch_size="frozen", activation_checkpointing="none")
    budget = int(0.87 * plain.predicted_peak_gib * 2**30)
    tight = planned(memory=budget, norm_batch_size="frozen")
    assert tight.activation_checkpointing == "segments"
    measured = measure(tight, network, random_images(3, PX), optimizer="sgd")
    assert_within_margin(measured, tight)
    assert measured.peak_allocated_gib * 2**30 <= budget
    loose = replace(tight, activation_checkpointing="none", segments=())
    kept = measure(loose, network, random_images(3, PX), optimizer="sgd")
    assert kept.peak_allocated_gib > 1.02 * measured.peak_allocated_gib


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize(
    ("name", "img_size", "memory"),
    [("resnet18", 32, "160MiB"), ("resnet18", 32, "250MiB"), ("seresnet18", 64, "2GiB")],
)
def test_no_plan_is_above_its_budget(name, img_size, memory, num_threads):
    """Networks of basic blocks at few pixels, where Winograd's weights are the peak on AVX2."""
    torch.set_num_threads(num_threads)
    try:
        found = plan(
            name,
            img_size=img_size,
            global_batch_size=64,
            norm_batch_size=32,
            num_classes=10,
            memory=memory,
            device="cpu",
            compare=False,
        )
        model = create_backbone(name, num_classes=10, img_size=img_size)
        if memory != "2GiB" and not found.fits:  # where an algorithm needs more
            assert found.predicted_peak_gib > found.budget_gib and found.why
            return
        assert found.fits
        measured = measure(found, model, random_images(3, img_size), optimizer="sgd")
    finally:
        torch.set_num_threads(1)
    assert measured.peak_allocated_gib <= found.predicted_peak_gib <= found.budget_gib
    assert_within_margin(measured, found)


def test_an_update_of_the_plan_is_its_micro_steps_and_one_commit(network):
    found = planned(global_batch_size=256)
    measured = measure(found, network, random_images(3, PX), optimizer="sgd", num_micro_steps=3)
    assert measured.num_micro_steps == 3
    expected = 8 * measured.seconds_per_micro_step + measured.commit_seconds
    assert measured.seconds_per_update(found) == expected


def test_nothing_of_the_callers_changes(network):
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    network.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modules = [(type(m), dict(vars(m))) for m in network.modules()]
    state = torch.get_rng_state()
    found = planned(activation_checkpointing="full", memory_format="channels_last")
    measure(found, network, random_images(3, PX), optimizer="sgd")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert all(p.is_contiguous() for p in network.parameters())
    assert [(type(m), dict(vars(m)).keys()) for m in network.modules()] == [
        (kind, own.keys()) for kind, own in modules
    ]
    assert not any(m.training or getattr(m, "grad_checkpointing", False) for m in network.modules())
    assert Accelerator().mixed_precision == accelerator.mixed_precision == "bf16"


def test_what_is_no_image_classification_is_measured_with_its_own_loss():
    model = nn.Sequential(nn.Embedding(50, 512), nn.Flatten(), nn.Linear(4096, 1))

    def make_batch(num_samples):
        return {"ids": torch.zeros(num_samples, 8, dtype=torch.long), "y": torch.ones(num_samples)}

    def loss_fn(model, batch):
        return F.mse_loss(model(batch["ids"])[:, 0], batch["y"])

    how = {"make_batch": make_batch, "loss_fn": loss_fn}
    options = {"global_batch_size": 512, "micro_batch_size": 256, "memory": "1GiB", "device": "cpu"}
    found = plan(model, compare=False, **options, **how)
    measured = measure(found, model, make_batch, loss_fn=loss_fn, optimizer="sgd")
    assert_within_margin(measured, found)


# -- the report -----------------------------------------------------------------------------------


def test_a_report_has_the_plan_both_numbers_and_what_they_depend_on(tmp_path, capsys):
    path = tmp_path / "report.json"
    assert cli.main(["plan", *FLAGS, "--device", "cpu", "--json", "--report", str(path)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(path.read_text())
    assert found["plan"] == json.loads(out), "--json prints the plan alone"
    assert found["predicted"].keys() == found["error_pct"].keys() <= found["measured"].keys()
    for key in ("peak_allocated_gib", "seconds_per_update"):
        predicted, measured = found["predicted"][key], found["measured"][key]
        assert found["error_pct"][key] == pytest.approx(100 * (predicted - measured) / measured)
    assert found["predicted"]["peak_allocated_gib"] == found["plan"]["predicted_peak_gib"]
    workspaces = found["plan"]["workspaces"]
    assert 0 < workspaces["margin_gib"] < 0.001
    margin_pct = 100 * workspaces["margin_gib"] / found["measured"]["peak_allocated_gib"]
    assert 0 <= found["error_pct"]["peak_allocated_gib"] <= 2 * margin_pct
    assert workspaces["instruction_set"] == instruction_set()
    assert {"python", "torch", "timm", "accelerate", "lbaccel", "cuda", "cudnn"} <= found[
        "versions"
    ].keys()
    assert found["measured"]["device"]
    (line,) = err.splitlines()
    for number in (found["predicted"], found["measured"]):
        assert f"{number['peak_allocated_gib']:.3f}" in line
        assert f"{number['seconds_per_update']:.3g}" in line
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_a_file_that_is_there_is_named_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lbaccel.planning.planner.plan", lambda *a, **k: pytest.fail("planned"))
    path = tmp_path / "report.json"
    path.write_text("mine")
    assert cli.main(["plan", *FLAGS, "--device", "cpu", "--report", str(path)]) == 2
    assert str(path) in capsys.readouterr().err
    assert path.read_text() == "mine"
    nowhere = tmp_path / "no" / "report.json"
    assert cli.main(["plan", *FLAGS, "--device", "cpu", "--report", str(nowhere)]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_a_report_needs_the_device_that_the_plan_is_for(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "report.json"
    flags = ["plan", *FLAGS, "--report", str(path)]
    assert cli.main([*flags, "--device", "RTX 3060"]) == 2
    assert "for RTX 3060, and the device at hand is cpu" in (error := capsys.readouterr().err)
    assert "--device 'cpu'" in error
    assert cli.main([*flags, "--device", "cpu", "--world-size", "2"]) == 2
    assert "Use --world-size 1 --global-batch-size 32" in capsys.readouterr().err
    assert not path.exists()


def test_a_plan_that_does_not_fit_is_printed_and_not_run(tmp_path, capsys):
    flags = [*FLAGS[:-4], "--memory", "60MiB", "--device", "cpu"]
    path = tmp_path / "report.json"
    assert cli.main(["plan", *flags, "--report", str(path)]) == 1
    out, err = capsys.readouterr()
    assert "does not fit" in out and "no report" in err and not path.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "fp16"}, "Use --precision bf16"),
        ({"predicted_peak_gib": 1e6}, "--memory"),
        ({"device": CARDS["T4"]}, "device at hand"),
    ],
)
def test_what_can_not_be_measured_here_is_refused(options, words, network, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = replace(planned(), **options)
    with pytest.raises(InputError, match=words):
        measure(found, network, random_images(3, PX), optimizer="sgd")


def test_weights_that_are_not_there_and_steps_of_none_are_refused(network):
    with torch.device("meta"):
        empty = create_backbone("resnet10t", num_classes=10)
    with pytest.raises(InputError, match="meta device"):
        measure(planned(), empty, random_images(3, PX), optimizer="sgd")
    with pytest.raises(InputError, match="num_micro_steps=0"):
        measure(planned(), network, random_images(3, PX), optimizer="sgd", num_micro_steps=0)


def test_a_plan_that_runs_out_of_memory_says_what_was_predicted(network):
    def loss_fn(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    found = planned(norm_batch_size=16)
    with pytest.raises(RunFailed, match=r"micro-batch of 32, for which 0\.\d+ GiB were predicted"):
        measure(found, network, random_images(3, PX), loss_fn=loss_fn, optimizer="sgd")


def test_on_cuda_the_context_and_the_allocators_rest_are_left_out():
    parts = {"weights": 1.0, "activations": 3.0, "allocator": 0.5, "context": 0.25}
    found = replace(planned(), device=CARDS["T4"], breakdown=parts, predicted_peak_gib=4.75)
    assert predicted_peaks(found) == (4.0, 4.5)
    measured = module.Measured(
        peak_allocated_gib=5.0,
        peak_reserved_gib=4.5,
        seconds_per_micro_step=2.0,
        commit_seconds=1.0,
        num_micro_steps=2,
        device="T4",
        how="",
    )
    error = as_report(found, measured)["error_pct"]
    assert error["peak_allocated_gib"] == pytest.approx(-20)
    assert error["peak_reserved_gib"] == 0
