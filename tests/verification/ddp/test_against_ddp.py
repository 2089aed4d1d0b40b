"""`lbaccel verify --against ddp`: one process against real DistributedDataParallel on ranks."""

from __future__ import annotations

import copy
import json

import pytest
import tiny  # noqa: F401  registers lbaccel_tiny
import torch
from timm.layers.drop import DropPath
from torch import nn
from verifying import mean_loss, net

from lbaccel import InputError
from lbaccel.cli import main
from lbaccel.verification.copies import float64_copy
from lbaccel.verification.ddp import against
from lbaccel.verification.ddp.against import composed, spans_of, verify_against_ddp
from lbaccel.verification.ddp.real import run_ddp
from lbaccel.verification.updates import Subject, planned


def images(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(count, 3, generator=generator),
        torch.randint(4, (count,), generator=generator),
    )


def network(*, momentum: float | None = 0.1):
    return net(nn.BatchNorm1d(6, momentum=momentum), nn.Dropout(0.3), block=(DropPath(0.2),))


def rows(certificate, what):
    return {(row.ddp, row.lbaccel): row for row in certificate.comparisons if row.what == what}


def failed(certificate):
    return [(r.what, r.lbaccel) for r in certificate.comparisons if r.verdict == "fail"]


@pytest.mark.parametrize("options", [{}, {"accumulation": 3}, {"sync_bn": True, "accumulation": 2}])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_one_process_does_the_update_of_two_ranks_under_ddp(options, momentum):
    count = 2 * options.get("accumulation", 1) * 5
    found = verify_against_ddp(
        network(momentum=momentum), mean_loss, images(count), gpus=2, **options
    )
    assert found.equivalent and found.largest_relative_error < 1e-12, str(found)
    assert found.norm_batch_size == (10 if "sync_bn" in options else 5)
    assert {row.what for row in found.comparisons} == {"loss", "gradient", "statistics"}
    assert "EQUIVALENT: one process does the update of 2 GPUs" in str(found)


@pytest.mark.parametrize("norm_batch_size", [2, 3, 8, "frozen"])
def test_another_norm_batch_size_is_found_in_gradients_and_statistics(norm_batch_size):
    found = verify_against_ddp(
        net(nn.BatchNorm1d(6)), mean_loss, images(8), gpus=2, norm_batch_size=norm_batch_size
    )
    assert not found.equivalent
    wrong = {what for what, _ in failed(found)}
    assert wrong == {"loss", "gradient", "statistics"}, str(found)


def test_without_batch_norm_there_are_no_statistics_and_gradients_agree():
    found = verify_against_ddp(net(nn.LayerNorm(6)), mean_loss, images(6), gpus=2)
    assert found.equivalent and found.norm_batch_size is None
    assert "no BatchNorm layer" in str(found) and not rows(found, "statistics")


def test_uneven_ranks_differ_by_ddps_equal_weights_and_by_nothing_else():
    model = net(nn.LayerNorm(6))
    found = verify_against_ddp(model, mean_loss, images(16), gpus=2, uneven=True)
    gradients = {row.lbaccel: row for row in found.comparisons if row.what == "gradient"}
    assert gradients["DDP's own batches, all with the same weight"].error < 1e-12
    assert not found.equivalent

    # by how much, in plain torch: 8 samples on rank 0, 4 on rank 1
    twin, (x, y) = float64_copy(model), images(16)
    means = []
    for span in (slice(0, 8), slice(8, 12)):
        loss = mean_loss(twin, (x[span].double(), y[span]))
        means.append(torch.autograd.grad(loss, list(twin.parameters())))
    first, last = (torch.cat([g.flatten() for g in part]) for part in means)
    ddp, ours = (first + last) / 2, (8 * first + 4 * last) / 12
    by_samples = gradients["DDP's own batches, weighted by their samples"]
    assert by_samples.error == pytest.approx(float((ours - ddp).norm() / ddp.norm()), rel=1e-9)


def test_a_bn_momentum_for_more_moves_keeps_the_share_of_the_old_statistics():
    """1 - (1 - m)^(1/W): what `lbaccel replicate` writes, on the real statistics of both sides."""
    model, gpus, steps = net(nn.BatchNorm1d(6, momentum=0.2)), 2, 2
    x, y = images(3)
    batch = x.double().repeat(gpus * steps, 1), y.repeat(gpus * steps)  # every micro-batch alike
    twin = float64_copy(model)
    twin[1].running_mean.normal_()
    ours = copy.deepcopy(twin)
    ours[1].momentum = 1 - (1 - 0.2) ** (1 / gpus)
    count = 3 * gpus * steps
    ranks = run_ddp(Subject(twin, mean_loss, batch, count, 3, 0), spans_of(3, gpus, steps))
    subject = Subject(ours, mean_loss, batch, count, 3, 0)
    found = planned(subject, subject.plan(3)).buffers
    for key in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(found[key], ranks[0].buffers[key], rtol=1e-12, atol=1e-14)
    subject = Subject(twin, mean_loss, batch, count, 3, 0)
    shorter = planned(subject, subject.plan(3)).buffers["1.running_mean"]
    assert not torch.allclose(shorter, ranks[0].buffers["1.running_mean"], rtol=1e-3)


def test_the_composition_is_that_of_batches_taken_one_after_the_other():
    torch.manual_seed(0)
    layer = nn.BatchNorm1d(3, momentum=0.3).double()
    layer.running_mean.normal_()
    parts = [torch.randn(4, 3, dtype=torch.float64) for _ in range(6)]
    own = []
    for rank in range(3):
        alone = copy.deepcopy(layer)
        for part in parts[2 * rank : 2 * rank + 2]:
            alone(part)
        own.append({f"bn.{name}": buffer for name, buffer in alone.named_buffers()})
    before = copy.deepcopy(layer)
    for part in parts:
        layer(part)
    found = composed({"bn": before}, own, num_moves=2)
    for name, buffer in layer.named_buffers():
        torch.testing.assert_close(found[f"bn.{name}"], buffer, rtol=1e-12, atol=1e-14)


def test_a_rank_that_saw_other_samples_is_found(monkeypatch):
    """A comparison that takes DDP's word for everything would pass here."""
    right = against.spans_of

    def shifted(*args, **options):
        spans = right(*args, **options)
        return [*spans[:-1], [(start - 1, size) for start, size in spans[-1]]]

    monkeypatch.setattr(against, "spans_of", shifted)
    monkeypatch.setattr("lbaccel.verification.ddp.real._check_rank", lambda spans, rank: None)
    found = verify_against_ddp(net(nn.LayerNorm(6)), mean_loss, images(8), gpus=2)
    assert not found.equivalent


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus": 3}, "8 samples are not 3 GPUs x 1 micro-batches x b"),
        ({"gpus": 0}, "gpus=0 is not a whole number"),
        ({"gpus": 2, "uneven": True, "sync_bn": True}, "without SyncBatchNorm"),
        ({"gpus": 2, "norm_batch_size": 9}, "norm_batch_size=9 is larger"),
    ],
)
def test_what_can_not_be_compared_says_why(options, words):
    with pytest.raises(InputError, match=words):
        verify_against_ddp(net(nn.BatchNorm1d(6)), mean_loss, images(8), **options)


TINY = ["verify", "--model", "lbaccel_tiny", "--img-size", "8"]


def test_the_command_shows_a_table_and_exits_with_0_or_1(capsys):
    flags = [*TINY, "--against", "ddp", "--gpus", "2", "--per-gpu-batch", "6"]
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("lbaccel verify --against ddp: lbaccel_tiny, random images of 8 px")
    assert "DDP: 2 gloo ranks x 6 samples" in shown and "norm_batch_size 6" in shown
    assert main([*flags, "--norm-batch-size", "3", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["equivalent"] is False and found["norm_batch_size"] == 3


def test_flags_of_the_comparison_need_it(capsys):
    assert main([*TINY, "--gpus", "2"]) == 2
    assert "--gpus is of --against ddp. Add that" in capsys.readouterr().err
    assert main([*TINY, "--against", "ddp", "--per-gpu-batch", "0"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "flags"),
    [
        ("resnet18", ["--accumulation", "2", "--drop-path", "0.2"]),
        ("resnet18", ["--sync-bn", "--accumulation", "2"]),
        ("mobilenetv2_100", ["--per-gpu-batch", "8"]),
        ("convnext_atto", []),
    ],
)
def test_four_ranks_of_real_networks(model, flags, capsys):
    assert main(["verify", "--against", "ddp", "--gpus", "4", "--model", model, *flags]) == 0, (
        capsys.readouterr().out
    )


@pytest.mark.slow
def test_four_uneven_ranks_differ(capsys):
    assert main(["verify", "--against", "ddp", "--model", "resnet18", "--uneven"]) == 1
    shown = capsys.readouterr().out
    assert "DDP weighs its ranks equally" in shown and "NOT EQUIVALENT: 3 of 9" in shown
