"""`verify`: which plans are tried, what they leave alone, and what can not be verified."""

from __future__ import annotations

import copy
import json
import os
import random
import time

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from timm.layers import drop
from timm.layers.drop import DropPath
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from verifying import (
    COUNT,
    Counting,
    TorchNoise,
    assert_equivalent,
    cells,
    check,
    found,
    mean_loss,
    net,
    samples,
)

from lbaccel import Certificate, InputError, RunFailed
from lbaccel.cli import main
from lbaccel.verification import ranks
from lbaccel.verification.diagnosis import causes
from lbaccel.verification.diagnosis.probe import OUTSIDE, ROOT

# -- what passes ----------------------------------------------------------------------------------


def test_every_plan_of_a_sound_network_is_tried_and_passes():
    certificate = check(net(nn.LayerNorm(6)))
    assert_equivalent(certificate)
    partitions = ["11", "6 + 5", "4 + 4 + 3", "11 x 1", "(3 + 3) | (3 + 2)"]
    assert [(c.partition, c.ranks, c.checkpointing) for c in certificate.cells] == [
        (p, 2 if "|" in p else 1, recomputed) for p in partitions for recomputed in (False, True)
    ]
    assert str(certificate).endswith(f"{certificate.largest_relative_error:.1e}).")
    assert "EQUIVALENT: all 10 plans" in str(certificate)


@pytest.mark.parametrize(
    "layer",
    [nn.Dropout(0.4), nn.AlphaDropout(0.4), DropPath(0.4), nn.LayerNorm(6), nn.GroupNorm(2, 6)],
    ids=lambda layer: type(layer).__name__,
)
def test_keyed_masks_and_norms_over_one_sample_pass(layer):
    assert_equivalent(check(net(layer, block=(copy.deepcopy(layer),))))


@pytest.mark.parametrize("norm_batch_size", [1, 2, 4, 19, "frozen"])
def test_batch_norm_passes_with_ghost_batches_or_frozen(norm_batch_size):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.ReLU()),
                nn.BatchNorm2d(3, momentum=None),
                nn.Conv2d(3, 3, 2),
                nn.BatchNorm2d(3, track_running_stats=norm_batch_size == "frozen"),
                nn.Flatten(),
                nn.LazyLinear(4),
            )
            self(torch.randn(2, 1, 5, 5))

        def forward(self, x):
            return self.net(x)

    torch.manual_seed(0)
    count = 56 if norm_batch_size == 19 else COUNT
    batch = torch.randn(count, 1, 5, 5), torch.randint(4, (count,))
    model = Maps()
    certificate = check(model, batch=batch, norm_batch_size=norm_batch_size)
    assert_equivalent(certificate)
    finest = {1: "11 x 1", 4: "4 + 4 + 3", 19: "19 + 19 + 18", "frozen": "11 x 1"}
    finest[2] = "2 + 2 + 2 + 2 + 2 + 1"
    assert finest[norm_batch_size] in [c.partition for c in certificate.cells]
    assert found(check(model, batch=batch))["BatchNorm over the micro-batch"] == "net.0.1"


def test_a_weighted_loss_passes_with_its_weight_and_fails_without():
    targets = samples()[1].clone()
    targets[[0, 3, 4, 9]] = -100

    def weighted(model, micro_batch):
        x, y = micro_batch
        weight = (y != -100).sum()
        loss = F.cross_entropy(model(x), y, ignore_index=-100, reduction="sum")
        return loss / weight.clamp(min=1), weight

    batch = samples()[0], targets
    assert_equivalent(check(net(), weighted, batch))
    unweighted = check(net(), lambda m, b: weighted(m, b)[0], batch)
    assert found(unweighted) == {causes.COUPLED_LOSS: OUTSIDE}
    assert "return (loss, weight)" in unweighted.findings[0].advice


def test_batches_may_be_dicts_lists_and_nested_with_what_is_no_row_left_whole():
    x, y = samples()
    seen = []

    def loss_fn(model, b):
        assert b["scale"].ndim == 0 and b["name"] == "tiny"
        seen.append(len(b["x"]))
        return F.cross_entropy(model(b["x"]) * b["scale"], b["rest"][0])

    batch = {"x": x, "rest": [y], "scale": torch.tensor(0.5), "name": "tiny"}
    assert_equivalent(check(net(), loss_fn, batch))
    assert seen[:3] == [2, 3, COUNT]  # masks are learned on two and three samples
    assert seen.count(1) == 2 * 2 * COUNT  # two updates


def test_a_model_on_its_side_is_taken_as_it_is_in_training():
    model = net(nn.Dropout(0.5))
    assert_equivalent(check(model.eval()))
    assert not model.training and not model[1].training
    frozen = net(nn.BatchNorm1d(6))
    frozen[1].eval()  # by its user: it takes no statistics, so it couples nothing
    assert_equivalent(check(frozen))


# -- what stays as it was -------------------------------------------------------------------------


def test_nothing_of_the_users_changes():
    model = net(nn.BatchNorm1d(6), nn.Dropout(0.5), Counting(), TorchNoise())
    model.register_forward_hook(lambda *args: print(np.random.rand(), random.random()))
    mean_loss(model, samples()).backward()
    model[2].eval()
    batch = samples()

    def surroundings():
        return copy.deepcopy(
            (
                {k: v.tolist() for k, v in model.state_dict().items()},
                {k: p.grad.tolist() for k, p in model.named_parameters()},
                [(m.training, type(m), len(m._forward_pre_hooks)) for m in model.modules()],
                [t.tolist() for t in batch],
                torch.get_rng_state().tolist(),
                str(np.random.get_state()),
                random.getstate(),
            )
        )

    functions = F.dropout, drop.drop_path, F.scaled_dot_product_attention
    functions += nn.utils.clip_grad_norm_, torch.get_default_dtype(), torch.is_grad_enabled()
    before, gradient = surroundings(), model[0][0].weight.grad
    with torch.no_grad(), torch.autocast("cpu"):
        check(model, batch=batch)
        assert torch.is_autocast_enabled("cpu") and not torch.is_grad_enabled()
    check(model, batch=batch, norm_batch_size=4)
    assert surroundings() == before and model[0][0].weight.grad is gradient
    after = F.dropout, drop.drop_path, F.scaled_dot_product_attention
    after += nn.utils.clip_grad_norm_, torch.get_default_dtype(), torch.is_grad_enabled()
    assert after == functions
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32


def test_a_loss_function_that_fails_leaves_nothing_behind_either():
    model = net(Counting())
    state = torch.get_rng_state()

    def failing(model, micro_batch):
        model(micro_batch[0])
        raise LookupError("no such label")

    with pytest.raises(InputError, match=r"whole batch of 11 samples.*LookupError: no such label"):
        check(model, failing)
    assert model[1].count == 0 and torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_a_loss_function_may_work_in_place():
    def in_place(model, micro_batch):
        x, y = micro_batch
        return F.cross_entropy(model(x.mul_(2.0)), y)

    batch = samples()
    before = batch[0].clone()
    assert_equivalent(check(net(), in_place, batch))
    assert torch.equal(batch[0], before)


# -- what can't be verified -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (lambda m, b: m(b[0]), r"returned shape \(11, 4\)"),
        (lambda m, b: mean_loss(m, b).item(), "returned <class 'float'>"),
        (lambda m, b: mean_loss(m, b).detach(), "requires grad"),
    ],
)
def test_what_is_no_loss_is_refused(loss_fn, text):
    with pytest.raises(InputError, match=text):
        check(net(), loss_fn)


def test_a_loss_of_another_model_or_of_parameters_outside_is_refused():
    model, scale = net(), nn.Parameter(torch.ones(()))
    with pytest.raises(InputError, match="4 parameters outside the model"):
        check(model, lambda _, b: mean_loss(model.double(), b))
    with pytest.raises(InputError, match=r"1 parameters outside the model \(shapes \[\(\)\]\)"):
        check(net(), lambda m, b: scale * mean_loss(m, b))
    assert scale.grad is None and all(p.grad is None for p in model.parameters())


def test_a_loss_that_is_not_finite_is_refused_and_one_in_a_plan_fails_it():
    with pytest.raises(RunFailed, match="the loss of the whole batch is nan"):
        check(net(), lambda m, b: mean_loss(m, b) * float("nan"))

    def nan_for_one(model, micro_batch):
        loss = mean_loss(model, micro_batch)
        return loss * float("nan") if len(micro_batch[0]) == 1 else loss

    certificate = check(net(), nan_for_one)
    failing = cells(certificate, verdict="fail")
    assert not certificate.equivalent and {c.partition for c in failing} == {"11 x 1"}
    assert all(c.loss_error is None and "not finite" in c.reason for c in failing)
    assert found(certificate) == {causes.FAILS: OUTSIDE}
    json.loads(certificate.to_json(), parse_constant=pytest.fail)


def test_batches_that_can_not_be_cut_are_refused():
    x, y = samples()
    for batch, text in (((x, y[:9]), r"\(11, 3\), \(9,\)"), ("text", "no tensor with rows")):
        with pytest.raises(InputError, match=text):
            check(net(), batch=batch)
    with pytest.raises(InputError, match="norm_batch_size=12 is larger"):
        check(net(nn.BatchNorm1d(6)), norm_batch_size=12)


def test_a_model_that_can_not_be_copied_is_refused():
    model = net()
    model.cache = model(samples()[0])  # not a leaf: deepcopy refuses it
    with pytest.raises(InputError, match=r"can't be copied .*deepcopy"):
        check(model)
    with pytest.raises(InputError, match="can't be copied"):
        check(nn.Sequential(nn.LazyLinear(4)))
    prepared = net()
    Accelerator(cpu=True, mixed_precision="bf16").prepare(prepared)
    with pytest.raises(InputError, match=r"before accelerator\.prepare"):
        check(prepared)


def test_wrapped_networks_are_taken_out_of_their_wrappers():
    certificate = check(nn.DataParallel(torch.compile(net())))
    assert_equivalent(certificate)
    assert certificate.model == "Sequential"


class ChecksItself(nn.Module):
    """Activation checkpointing of the user's own, which no plan switches off."""

    def __init__(self):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def test_a_networks_own_recompute_changes_no_statistic_of_reference_or_plan():
    assert_equivalent(check(net(ChecksItself()), norm_batch_size=4))
    assert found(check(net(ChecksItself())))[causes.BATCH_NORM] == "1.block.1"


def test_a_batch_of_one_ghost_batch_has_no_two_ranks_and_says_so():
    certificate = check(net(nn.BatchNorm1d(6)), norm_batch_size=11)
    two = cells(certificate, verdict="not run")
    assert certificate.equivalent and len(two) == 2
    assert "EQUIVALENT for the 2 of 4 plans that ran" in str(certificate)
    assert all("two ranks need 2 x 11" in c.reason for c in two)


def test_a_network_without_blocks_can_name_what_is_recomputed():
    model = nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 4))
    assert_equivalent(check(model), num_not_run=5)
    certificate = check(model, blocks=["0"])
    assert_equivalent(certificate)
    assert "1 blocks wrapped (0)" in certificate.checkpointing
    with pytest.raises(InputError, match="blocks="):
        check(model, blocks=["9"])


def test_a_layer_that_runs_twice_is_refused_in_some_plans_and_right_in_the_others():
    batch_norm = nn.BatchNorm1d(6)
    certificate = check(net(batch_norm, nn.Linear(6, 6), batch_norm), norm_batch_size=4)
    assert certificate.equivalent
    refused = cells(certificate, verdict="not run")
    assert {c.partition for c in refused} == {"11", "8 + 3"}
    assert all("runs 2 times" in c.reason for c in refused)


# -- ranks ----------------------------------------------------------------------------------------


def test_ranks_are_two_processes_that_leave_nothing_on_standard_output(capfd):
    def function(rank):
        print("from a rank", flush=True)
        total = torch.tensor(float(rank + 1))
        torch.distributed.all_reduce(total)
        return os.getpid(), float(total)

    (kind, (pid, total)), (_, (other, _)) = ranks.run_ranks(function)
    assert kind == "value" and total == 3.0 and len({pid, other, os.getpid()}) == 3
    assert capfd.readouterr() == ("", "")
    for child in (pid, other):  # neither is left
        with pytest.raises(ChildProcessError):
            os.waitpid(child, os.WNOHANG)


def test_a_rank_that_raises_ends_or_hangs_is_reported():
    def raising(rank):
        if rank == 1:
            raise KeyError("of rank 1")
        return rank

    reports = ranks.run_ranks(raising, timeout_seconds=20)
    assert reports[1] == ("error", ("KeyError", "KeyError: 'of rank 1'"))
    reports = ranks.run_ranks(lambda rank: os._exit(1), timeout_seconds=20)
    assert [kind for kind, _ in reports] == ["error", "error"]
    started = time.monotonic()
    reports = ranks.run_ranks(lambda rank: time.sleep(60), timeout_seconds=0.5)
    assert [kind for kind, _ in reports] == ["no start", "no start"]
    assert "did not finish within" in reports[0][1] and time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("where", "name", "value", "text"),
    [
        ("os", "fork", None, "has no fork"),
        ("torch.cuda", "is_initialized", lambda: True, "CUDA is in use"),
        ("torch.distributed", "is_initialized", lambda: True, "process group runs"),
        ("torch.distributed", "is_gloo_available", lambda: False, "without gloo"),
    ],
)
def test_where_ranks_can_not_be_had_their_cells_are_not_run(monkeypatch, where, name, value, text):
    if value is None:
        monkeypatch.delattr(f"{where}.{name}")
    else:
        monkeypatch.setattr(f"{where}.{name}", value)
    certificate = check(net())
    assert certificate.equivalent
    two = cells(certificate, ranks=2)
    assert [c.verdict for c in two] == ["not run"] * 2 and text in two[0].reason
    assert "EQUIVALENT for the 8 of 10 plans that ran" in str(certificate)


def test_a_defect_that_only_ranks_have_is_named():
    class PerRank(nn.Module):
        def forward(self, x):
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            return x * (1 + rank)

    certificate = check(net(PerRank()))
    assert not certificate.equivalent
    assert {c.verdict for c in cells(certificate, ranks=1)} == {"pass"}
    assert {c.verdict for c in cells(certificate, ranks=2)} == {"fail"}
    assert list(found(certificate)) == [causes.RANKS]


# -- certificate and command line -----------------------------------------------------------------

FIELDS = {
    "model", "data", "num_samples", "norm_batch_size", "num_batch_norm_layers", "reference",
    "compiled", "checkpointing", "tolerance", "versions", "cells", "findings", "equivalent",
    "largest_relative_error",
}  # fmt: skip


def run(capsys, *arguments):
    code = main(["verify", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def test_vit_with_drop_path_passes_on_the_command_line_in_strict_json(capsys):
    code, out, err = run(
        capsys,
        "--model",
        "vit_tiny_patch16_224",
        "--drop-path",
        "0.3",
        "--img-size",
        "32",
        "--json",
    )
    certificate = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and err == "" and set(certificate) == FIELDS
    assert certificate["equivalent"] and certificate["num_samples"] == 11
    assert [c["verdict"] for c in certificate["cells"]] == ["pass"] * 10
    assert certificate["largest_relative_error"] < 1e-12
    assert set(certificate["versions"]) == {"lbaccel", "torch", "timm", "python"}
    assert "drop-path 0.3" in certificate["data"] and "32 px" in certificate["data"]


def test_a_resnet_fails_as_it_is_with_advice_and_passes_with_it(capsys):
    small = ("--model", "resnet10t", "--img-size", "32")
    code, out, _ = run(capsys, *small)
    assert code == 1 and "NOT EQUIVALENT" in out
    assert "BatchNorm over the micro-batch, at conv1.1" in out and "--norm-batch-size 32" in out
    assert "double update under recompute, at layer1.0.bn1" in out
    for value in ("4", "frozen"):
        code, out, _ = run(capsys, *small, "--norm-batch-size", value)
        assert code == 0, out
        assert "EQUIVALENT: all" in out and "not run" not in out


def test_weights_that_can_not_be_had_end_with_code_1_whatever_the_size(capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise RunFailed("pretrained weights can't be had")

    monkeypatch.setattr("lbaccel.verification.of_timm.create_backbone", no_network)
    code, out, err = run(capsys, "--model", "resnet10t", "--pretrained")
    assert (code, out) == (1, "") and err == "run failed: pretrained weights can't be had\n"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--model", "resnet10"), "Nearest: resnet10t"),
        (("--model", "vit_tiny_patch16_224", "--img-size", "8"), "can't take images of 8 px"),
        (("--model", "resnet10t", "--img-size", "0"), "--img-size='0' is not"),
        (("--model", "resnet10t", "--drop-rate", "1.5"), "--drop-rate='1.5' is not"),
        (("--model", "resnet10t", "--num-classes", "0"), "--num-classes='0' is not"),
        (("--model", "resnet10t", "--tolerance", "0"), "--tolerance='0' is not"),
        (("--model", "resnet10t", "--checkpoint", "nowhere.pth"), "nowhere.pth is no file"),
    ],
)
def test_bad_input_ends_with_code_2_and_no_certificate(capsys, arguments, text):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and text in err


def test_a_ghost_batch_that_is_no_number_is_refused(capsys):
    code, out, err = run(capsys, "--model", "resnet10t", "--norm-batch-size", "half")
    assert code == 2 and out == ""
    assert err == (
        "error: --norm-batch-size='half' is not a whole number from 1 to 2^53, 'global' or "
        "'frozen'.\n"
    )


def test_the_certificate_is_a_frozen_value_with_every_line_in_its_width():
    certificate = check(net(nn.BatchNorm1d(6)))
    assert isinstance(certificate, Certificate)
    with pytest.raises(AttributeError):
        certificate.model = "another"
    assert max(map(len, str(certificate).splitlines())) <= 100
    assert certificate.as_dict()["model"] == "Sequential"
    assert ROOT not in str(certificate)
