"""--train: the right parameters move, exactly, and what is frozen stays to the bit."""

from __future__ import annotations

import pytest
import timm
import torch
from reference import relative_error
from runs_of_recipe import differences, newest, run, stopped_at, tensors
from torch import nn
from torch.nn import functional as F
from updates import one_update, visiting_order

from lbaccel import InputError, verify
from lbaccel.optim.optimizers import create_optimizer
from lbaccel.optim.trained import METHODS, train_only

PARTS = METHODS[1:]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def model_of(name="test_resnet", **options):
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **options)


def trained(model):
    return {n for n, p in model.named_parameters() if p.requires_grad}


def expected(model, method):
    """By the names and types of timm's own modules, in other words than the function's."""
    classifiers = ("fc", "head", "head.fc", "classifier")
    head = {n for n, _ in model.named_parameters() if n.rsplit(".", 1)[0] in classifiers}
    norms = {
        f"{name}.{n}"
        for name, m in model.named_modules()
        if isinstance(m, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm))
        for n, _ in m.named_parameters()
    }
    biases = {n for n, _ in model.named_parameters() if n.rsplit(".", 1)[-1] == "bias"}
    return head | {"head": set(), "head+norms": norms, "bias+head": biases}[method]


@pytest.mark.parametrize("method", PARTS)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "mobilenetv2_050", "convnext_atto"])
def test_the_parameters_of_a_method_are_trained_and_no_other(name, method):
    model = model_of(name)
    line = train_only(model, method)
    assert trained(model) == expected(model, method)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    assert line == f"trains {count:,} of {total:,} parameters ({method})"


def test_full_changes_nothing_and_a_model_without_a_classifier_is_refused():
    model = model_of()
    assert (
        train_only(model, "full") is None
        and trained(model) == dict(model.named_parameters()).keys()
    )
    with pytest.raises(InputError, match="--train head: Linear does not tell its classifier"):
        train_only(nn.Linear(2, 2), "head")


def samples(count=12):
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    return images, torch.randint(5, (count,), generator=generator)


def reference(method, *, frozen):
    """Loss and gradients of one batch in plain torch, of the trained parameters alone."""
    model, (images, labels) = model_of().double(), samples()
    train_only(model, method)
    model.train(not frozen)
    order = visiting_order(len(images))
    loss = F.cross_entropy(model(images[order]), labels[order])
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return loss.item(), dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro", [2, 5, 12])
@pytest.mark.parametrize("method", ["head", "bias+head"])
def test_gradients_are_those_of_a_plain_batch_with_the_rest_frozen(method, micro, checkpointing):
    model = model_of().double()
    train_only(model, method)
    before = {n: b.clone() for n, b in model.named_buffers()}
    result, gradients, buffers = one_update(
        model,
        *samples(),
        micro_batch_size=micro,
        norm_batch_size="frozen",
        checkpointing=checkpointing,
    )
    loss, truth = reference(method, frozen=True)
    assert gradients.keys() == truth.keys() and abs(result.loss - loss) < 1e-12
    assert relative_error(gradients, truth) < 1e-12
    assert all(torch.equal(before[n], b) for n, b in buffers.items())


def test_under_head_and_norms_the_statistics_of_the_batch_are_learned_from():
    model = model_of().double()
    train_only(model, "head+norms")
    _, gradients, buffers = one_update(model, *samples(), micro_batch_size=12, norm_batch_size=12)
    _, truth = reference("head+norms", frozen=False)
    assert gradients.keys() == truth.keys() and relative_error(gradients, truth) < 1e-12
    assert any(int(b) == 1 for n, b in buffers.items() if n.endswith("num_batches_tracked"))


@pytest.mark.parametrize("method", PARTS)
def test_verify_proves_a_model_with_frozen_parameters(method):
    model, (images, labels) = model_of().double(), samples()
    train_only(model, method)
    norm = 4 if method == "head+norms" else "frozen"
    found = verify(
        model,
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        (images, labels),
        norm_batch_size=norm,
    )
    assert found.equivalent


@pytest.mark.parametrize(
    "options",
    [
        {"decay_all": True},
        {"layer_decay": 0.7},
        {"head_lr_scale": 10.0},
        {"lr_groups": "three"},
        {},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_the_optimizer_holds_what_is_trained_alone(name, options):
    model = model_of()
    train_only(model, "head")
    optimizer = create_optimizer(model, name, lr=0.1, weight_decay=1e-4, **options)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}


HEAD = ("--train", "head", "--norm-batch-size", "frozen")


def test_a_run_moves_the_classifier_alone_and_its_average_and_says_how_many(capsys):
    folder = run(*HEAD, "--max-updates", 4, "--ema-decay", 0.5)
    out = capsys.readouterr().out
    assert "trains 90 of 338 parameters (head)" in out
    assert "norm_batch_size: frozen, as the layers around BatchNorm (--train head)" in out
    assert "warning: --train head keeps most of a network that has learned nothing" in out
    first, last = run(*HEAD, "--max-updates", 1, "--ema-decay", 0.5, output="first"), folder
    before, after = tensors(first), tensors(last)
    moved = {n for n in before if n.startswith("model") and not torch.equal(before[n], after[n])}
    assert moved == {
        f"{stem}.fc.{n}" for stem in ("model", "model_ema") for n in ("weight", "bias")
    }


@pytest.mark.parametrize("method", PARTS)
def test_a_resume_of_it_is_the_unbroken_run_to_the_bit(method):
    flags = ["--train", method, "--ema-decay", 0.9]
    if method != "head+norms":
        flags += ["--norm-batch-size", "frozen"]
    truth = run(*flags, output="whole")
    folder = stopped_at(5, *flags)
    run("--resume", folder, *flags)
    assert newest(folder) and differences(folder, truth) == []
