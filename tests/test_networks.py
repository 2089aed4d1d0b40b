"""Networks for 32 px: their published sizes, their equations, and all of lbaccel takes them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from lbaccel import apply_activation_checkpointing
from lbaccel.models import OWN_NETWORKS, create_backbone


def conv(channels, width, size=3):
    return channels * width * size**2


def in_blocks(num_blocks, stem, widths, projects):
    """Parameters by the tables of the papers: convolutions, and gain and bias of each BatchNorm."""
    total, channels = conv(3, stem) + 2 * stem, stem
    for width in widths:
        for _ in range(num_blocks):
            total += conv(channels, width) + conv(width, width) + 4 * width
            if projects and channels != width:
                total += conv(channels, width, 1) + 2 * width
            channels = width
    return total + channels * 10 + 10


@pytest.mark.parametrize(
    ("name", "form", "published"),
    [
        ("cifar_resnet8", (1, 16, (16, 32, 64), False), 0.08e6),
        ("cifar_resnet20", (3, 16, (16, 32, 64), False), 0.27e6),
        ("wide_resnet16_4", (2, 64, (64, 128, 256), True), 2.75e6),
    ],
)
def test_the_parameters_are_those_of_the_papers(name, form, published):
    assert name in OWN_NETWORKS
    count = sum(p.numel() for p in create_backbone(name, num_classes=10).parameters())
    assert count == in_blocks(*form)
    assert count == pytest.approx(published, rel=0.06)


def norm(state, name, x, train):
    keys = [f"{name}.{key}" for key in ("running_mean", "running_var", "weight", "bias")]
    mean, var, gain, bias = (state[key].clone() for key in keys)
    return F.batch_norm(x, mean, var, gain, bias, training=train)


def plainly(state, x, *, num_blocks, projects, train):
    """The network of He et al. 2016, figure 3 and section 4.2, written as functions."""
    x = F.relu(norm(state, "bn1", F.conv2d(x, state["conv1.weight"], padding=1), train))
    for stage in (1, 2, 3):
        for block in range(num_blocks):
            at, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            inside = F.conv2d(x, state[f"{at}.conv1.weight"], stride=stride, padding=1)
            inside = F.relu(norm(state, f"{at}.bn1", inside, train))
            inside = F.conv2d(inside, state[f"{at}.conv2.weight"], padding=1)
            inside = norm(state, f"{at}.bn2", inside, train)
            if inside.shape == x.shape:
                shortcut = x
            elif projects:
                shortcut = F.conv2d(x, state[f"{at}.shortcut.0.weight"], stride=stride)
                shortcut = norm(state, f"{at}.shortcut.1", shortcut, train)
            else:
                shortcut = torch.zeros_like(inside)
                shortcut[:, : x.shape[1]] = x[:, :, ::stride, ::stride]
            x = F.relu(shortcut + inside)
    return F.linear(x.mean((2, 3)), state["head.fc.weight"], state["head.fc.bias"])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(
    ("name", "num_blocks", "projects"),
    [("cifar_resnet8", 1, False), ("cifar_resnet20", 3, False), ("wide_resnet16_4", 2, True)],
)
def test_the_logits_are_those_of_the_equations(name, num_blocks, projects, train):
    torch.manual_seed(0)
    model = create_backbone(name, num_classes=10).double().train(train)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    truth = plainly(state, x, num_blocks=num_blocks, projects=projects, train=train)
    torch.testing.assert_close(model(x), truth, rtol=1e-12, atol=1e-12)


def test_the_gain_of_the_last_norm_starts_at_one_unless_it_is_to_be_zero():
    for zero, value in ((False, 1.0), (True, 0.0)):
        model = timm.create_model("cifar_resnet8", zero_init_last=zero)
        gains = {m.bn2.weight.unique().item() for m in model.modules() if hasattr(m, "bn2")}
        assert gains == {value}
        assert model.layer1[0].bn1.weight.unique().item() == 1.0


@pytest.mark.parametrize("name", OWN_NETWORKS)
def test_they_have_the_interface_of_timms_networks(name):
    model = timm.create_model(name, num_classes=7, in_chans=1, drop_rate=0.5, drop_path_rate=0.1)
    x = torch.randn(2, 1, 32, 32)
    assert model(x).shape == (2, 7)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 8, 8)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model.num_classes == 3
    model.eval()
    plain = model(x)
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x.requires_grad_()), plain)
    names = timm.models.group_parameters(model, model.group_matcher())
    assert {name for group in names.values() for name in group} == {
        name for name, _ in model.named_parameters()
    }


def test_recompute_changes_no_gradient():
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = create_backbone("wide_resnet16_4", num_classes=10).double()
        if recompute:
            assert apply_activation_checkpointing(model).by_model
        x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_timm_builds_them_once_the_module_is_imported():
    code = "import timm, lbaccel.networks; print(timm.create_model('cifar_resnet20').num_features)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout == "64\n"


def test_a_plan_knows_them():
    from lbaccel import plan

    found = plan("cifar_resnet8", global_batch_size=64, norm_batch_size=32, memory="1GiB")
    assert found.model == "cifar_resnet8" and found.fits and found.units > 3
