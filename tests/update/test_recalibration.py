"""Statistics of a group against plain arithmetic, and a network that is left as it was."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from lbaccel.update.recalibration import measuring, write_statistics


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False),
        nn.BatchNorm2d(3, momentum=0.3),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4),
    ).double()


def images(seed, n=5):
    return torch.randn(n, 2, 6, 6, generator=torch.Generator().manual_seed(seed)).double()


def moments(y):
    """Mean and unbiased variance of each channel, from the definition."""
    flat = y.transpose(0, 1).flatten(1)
    mean = flat.sum(1) / flat.shape[1]
    return mean, ((flat - mean[:, None]) ** 2).sum(1) / (flat.shape[1] - 1)


def by_hand(net, x):
    first = nn.functional.conv2d(x, net[0].weight)
    mean, var = moments(first)
    count = first.numel() // 3
    biased = var * (count - 1) / count
    y = (first - mean[None, :, None, None]) / (biased + 1e-5).sqrt()[None, :, None, None]
    y = y * net[1].weight[None, :, None, None] + net[1].bias[None, :, None, None]
    second = nn.functional.conv2d(y.relu(), net[4].weight, net[4].bias)
    return torch.cat([mean, moments(second)[0], var, moments(second)[1]]).detach()


def test_a_groups_statistics_are_those_of_its_samples_and_the_network_is_as_before():
    net = network().train()
    with torch.no_grad():
        net[1].weight.uniform_(0.5, 2)
        net[1].bias.uniform_(-1, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net[3].eval()  # a mode of its own
    modes = [m.training for m in net.modules()]
    with torch.no_grad(), measuring(net) as taken:
        for seed in (1, 2):
            net(images(seed))
            torch.testing.assert_close(taken(), by_hand(net, images(seed)), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert [m.training for m in net.modules()] == modes and net[1].momentum == 0.3


@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv2_050", "levit_128s"])
def test_a_network_of_timms_has_the_statistics_of_torchs_update_bn(name):
    torch.manual_seed(0)
    size = 224 if name.startswith("levit") else 32
    net = timm.create_model(name, num_classes=3).double().eval()
    truth = copy.deepcopy(net)
    groups = [torch.randn(2, 3, size, size).double() for _ in range(2)]
    update_bn(groups, truth)
    with torch.no_grad(), measuring(net) as taken:
        total = torch.zeros(())
        for group in groups:
            net(group)
            total = total + taken()
    write_statistics(net, total / 2)
    found, wanted = net.state_dict(), truth.state_dict()
    for key in (k for k in wanted if "running" in k):
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-10, atol=1e-10)


def test_an_error_leaves_the_network_as_before():
    net = network().eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(KeyError), torch.no_grad(), measuring(net):
        net(images(1))
        raise KeyError
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.training and net[5].momentum == 0.1


def test_a_layer_that_runs_twice_has_the_mean_and_one_that_does_not_run_keeps_its_own():
    norm, idle = nn.BatchNorm1d(2).double(), nn.BatchNorm1d(3).double()
    with torch.no_grad():
        idle.running_mean.fill_(7.0)
        idle.running_var.fill_(5.0)
    net = nn.ModuleList([norm, idle])
    x = images(3)[:, :, 0, :1].squeeze(-1)
    with torch.no_grad(), measuring(net) as taken:
        norm(x)
        norm(3 * x + 1)
        found = taken()
    mean, var = x.mean(0), x.var(0)
    truth = torch.cat([2 * mean + 0.5, torch.full((3,), 7.0), 5 * var, torch.full((3,), 5.0)])
    torch.testing.assert_close(found, truth.double(), rtol=1e-12, atol=1e-12)
    write_statistics(net, found)
    torch.testing.assert_close(norm.running_mean, 2 * mean + 0.5)
    assert idle.running_var.tolist() == [5.0] * 3


def test_dropout_draws_nothing():
    net, x = network(), images(4)
    state = torch.random.get_rng_state()
    with torch.no_grad(), measuring(net) as taken:
        net(x)
        first = taken()
        net(x)
        assert torch.equal(first, taken())
    assert torch.equal(state, torch.random.get_rng_state())
