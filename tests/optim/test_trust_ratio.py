"""timm's LARS and LAMB as the recipe builds them, against the papers' formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import timm.optim
import torch
from torch import nn

from lbaccel.errors import InputError
from lbaccel.optim.optimizers import create_optimizer, notes

LR, DECAY, MOMENTUM, TRUST = 0.3, 1e-2, 0.9, 1e-3
BETAS, EPS = (0.9, 0.999), 1e-6
UPDATES = 4


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    model.double()
    with torch.no_grad():
        model[1].weight.mul_(1.3)  # its bias stays at zero
    return model


def gradients(model, scale):
    generator = np.random.default_rng(1)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    return [
        {name: scale * generator.standard_normal(shape) for name, shape in shapes.items()}
        for _ in range(UPDATES)
    ]


def trained(optimizer, model, grads):
    for update in grads:
        for name, p in model.named_parameters():
            p.grad = torch.from_numpy(update[name].copy())
        optimizer.step()
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def weights(model):
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


def adapts(name, shape, *, decay_all):
    """Biases and norms: no weight decay and no trust ratio, in both papers' code."""
    return decay_all or len(shape) > 1


def lars(model, grads, *, decay_all=False, nesterov=False):
    """You et al. 2017, algorithm 1: local rate eta |w| / (|g| + beta |w|)."""
    w = weights(model)
    v = dict.fromkeys(w, 0.0)
    for update in grads:
        for name, g in update.items():
            local, decay = 1.0, 0.0
            if adapts(name, g.shape, decay_all=decay_all):
                decay = DECAY
                size = np.linalg.norm(w[name])
                if size > 0:
                    local = TRUST * size / (np.linalg.norm(g) + decay * size)
            step = LR * local * (g + decay * w[name])
            v[name] = MOMENTUM * v[name] + step
            w[name] = w[name] - (step + MOMENTUM * v[name] if nesterov else v[name])
    return w


def lamb(model, grads, *, decay_all=False, clip=None):
    """You et al. 2020, algorithm 2, phi the identity."""
    w = weights(model)
    m = dict.fromkeys(w, 0.0)
    v = dict.fromkeys(w, 0.0)
    for t, raw in enumerate(grads, 1):
        norm = np.sqrt(sum((g**2).sum() for g in raw.values()))
        shrink = 1.0 if clip is None else min(1.0, clip / norm)
        for name in w:
            g = raw[name] * shrink
            m[name] = BETAS[0] * m[name] + (1 - BETAS[0]) * g
            v[name] = BETAS[1] * v[name] + (1 - BETAS[1]) * g**2
            r = m[name] / (1 - BETAS[0] ** t)
            r = r / (np.sqrt(v[name] / (1 - BETAS[1] ** t)) + EPS)
            ratio = 1.0
            if adapts(name, g.shape, decay_all=decay_all):
                r = r + DECAY * w[name]
                size = np.linalg.norm(w[name])
                ratio = size / np.linalg.norm(r) if size > 0 else 1.0
            w[name] = w[name] - LR * ratio * r
    return w


def close(found, truth, rtol=1e-7):
    for name, value in truth.items():
        np.testing.assert_allclose(found[name], value, rtol=rtol, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize(("name", "nesterov"), [("lars", False), ("nlars", True)])
def test_lars_is_the_paper_s_and_spares_biases_and_norms(name, nesterov, decay_all):
    model = network()
    grads = gradients(model, 1.0)
    truth = lars(model, grads, decay_all=decay_all, nesterov=nesterov)
    optimizer = create_optimizer(model, name, lr=LR, weight_decay=DECAY, decay_all=decay_all)
    found = trained(optimizer, model, grads)
    close(found, truth)
    other = lars(network(), grads, decay_all=not decay_all, nesterov=nesterov)
    assert np.abs(other["1.weight"] - found["1.weight"]).max() > 0.1  # the test can tell


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("clip", [None, 7.0])
def test_lamb_is_the_paper_s_and_clips_at_one_only_where_nothing_was_asked(clip, decay_all):
    model = network()
    grads = gradients(model, 3.0)
    # asked for, the clipping is the recipe's own, before the optimizer: none here
    truth = lamb(model, grads, decay_all=decay_all, clip=1.0 if clip is None else None)
    optimizer = create_optimizer(
        model, "lamb", lr=LR, weight_decay=DECAY, decay_all=decay_all, clip_grad_norm=clip
    )
    assert {g["max_grad_norm"] for g in optimizer.param_groups} == {1.0 if clip is None else None}
    found = trained(optimizer, model, grads)
    close(found, truth)
    other = lamb(network(), grads, decay_all=not decay_all, clip=1.0 if clip is None else None)
    assert np.abs(other["1.weight"] - found["1.weight"]).max() > 0.01


def test_lamb_s_own_clipping_moves_the_weights_so_it_is_said():
    grads = gradients(network(), 3.0)
    grads[1] = {name: 50 * g for name, g in grads[1].items()}  # Adam forgives a constant scale
    clipped, free = (lamb(network(), grads, clip=clip) for clip in (1.0, None))
    assert np.abs(clipped["3.weight"] - free["3.weight"]).max() > 0.01
    (line,) = notes("lamb", decay_all=False, clip_grad_norm=None)
    assert "clips the gradient's norm at 1.0" in line
    assert notes("lamb", decay_all=False, clip_grad_norm=1.0) == []


@pytest.mark.parametrize(("name", "plain"), [("lars", "momentum"), ("nlars", "sgd")])
def test_without_weight_decay_timm_s_lars_is_plain_sgd(name, plain):
    ends = []
    for optimizer in (name, plain):
        model = network()
        made = timm.optim.create_optimizer_v2(model, optimizer, lr=LR, weight_decay=0.0)
        ends.append(trained(made, model, gradients(model, 1.0)))
    close(ends[0], ends[1], rtol=1e-12)


def test_without_weight_decay_timm_s_lamb_is_plain_adam():
    ends = []
    for optimizer, options in (("lamb", {"max_grad_norm": None}), ("adam", {"eps": EPS})):
        model = network()
        made = timm.optim.create_optimizer_v2(
            model, optimizer, lr=LR, weight_decay=0.0, betas=BETAS, **options
        )
        ends.append(trained(made, model, gradients(model, 1.0)))
    close(ends[0], ends[1], rtol=1e-9)


@pytest.mark.parametrize("name", ["lars", "larc", "nlars", "nlarc", "lamb", "lambc", "lambw"])
@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_so_the_recipe_refuses_them_without_weight_decay(name, layer_decay):
    with pytest.raises(InputError, match=f"--optimizer {name} with --weight-decay 0: timm gives"):
        create_optimizer(network(), name, lr=LR, weight_decay=0.0, layer_decay=layer_decay)


def test_the_tiny_decay_that_the_refusal_names_keeps_the_trust_ratio():
    model = network()
    start, grads = weights(model), gradients(model, 1.0)[:1]
    optimizer = create_optimizer(model, "lars", lr=LR, weight_decay=1e-12)
    found = trained(optimizer, model, grads)
    for name in ("0.weight", "3.weight"):
        w, g = start[name], grads[0][name]
        step = LR * TRUST * np.linalg.norm(w) / np.linalg.norm(g) * g
        np.testing.assert_allclose(found[name], w - step, rtol=1e-7)


def test_decay_on_everything_is_said_for_optimizers_with_a_trust_ratio_only():
    for name in ("lars", "lamb"):
        (line,) = notes(name, decay_all=True, clip_grad_norm=1.0)
        assert f"--decay-all with {name}" in line
    assert notes("sgd", decay_all=True, clip_grad_norm=None) == []


def test_lars_with_groups_of_their_own_adapts_where_it_decays():
    model = network()
    model.get_classifier = lambda: model[3]
    optimizer = create_optimizer(model, "lars", lr=LR, weight_decay=DECAY, head_lr_scale=10.0)
    spared = {id(p) for name, p in model.named_parameters() if p.ndim == 1}
    for group in optimizer.param_groups:
        for p in group["params"]:
            assert (group["weight_decay"] == 0) == (id(p) in spared)
