from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models import _registry
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from lbaccel.batch.plan import MicroBatch
from lbaccel.errors import InputError
from lbaccel.update.checkpointing import apply_activation_checkpointing
from lbaccel.update.normalization import convert_batch_norm, has_batch_norm

# The smallest network of each of timm's families whose own hook refuses, and an image size.
REFUSING = {
    "coat_tiny": 224,
    "convit_tiny": 224,
    "crossvit_tiny_240": 240,
    "cs3darknet_focus_s": 64,
    "dla46x_c": 64,
    "hrnet_w18_small": 64,
    "inception_resnet_v2": 139,
    "inception_v3": 139,
    "inception_v4": 139,
    "legacy_seresnet18": 64,
    "legacy_xception": 96,
    "nasnetalarge": 96,
    "pit_ti_224": 224,
    "pnasnet5large": 96,
    "selecsls42": 64,
    "sequencer2d_s": 224,
    "twins_pcpvt_small": 224,
    "vgg11_bn": 64,
}
FAST = ("vgg11_bn", "hrnet_w18_small", "dla46x_c")


def observe(model, x, norm_batch_size=2):
    """Loss, gradients, buffers, random state and saved bytes of one forward and backward."""
    norm = convert_batch_norm(model, norm_batch_size if has_batch_norm(model) else None)
    norm.begin()
    torch.manual_seed(1)
    saved = [0]

    def pack(tensor):
        saved[0] += tensor.nbytes
        return tensor

    with norm.forward(MicroBatch(0, (len(x),))):
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(x).square().mean()
        with norm.backward():
            loss.backward()
    norm.commit()
    gradients = [p.grad for p in model.parameters()]
    return loss.item(), gradients, list(model.buffers()), torch.get_rng_state(), saved[0]


def assert_recompute_changes_nothing(name, size, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **options).double().train()
    wrapped = copy.deepcopy(model)
    keys = list(model.state_dict())
    done = apply_activation_checkpointing(wrapped)
    assert list(wrapped.state_dict()) == keys
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    plain, again = observe(model, x), observe(wrapped, x)
    assert plain[0] == again[0]
    for a, b in zip(plain[1], again[1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for a, b in zip(plain[2], again[2], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(plain[3], again[3])
    assert again[4] < plain[4] / 2, (plain[4], again[4])
    return done


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in REFUSING],
)
def test_a_family_without_a_hook_is_wrapped_and_nothing_changes(name):
    done = assert_recompute_changes_nothing(name, REFUSING[name])
    assert not done.by_model and len(done.blocks) >= 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet18", {"drop_rate": 0.5}),
        ("vit_tiny_patch16_224", {"img_size": 64, "drop_path_rate": 0.3, "proj_drop_rate": 0.3}),
        ("efficientnet_b0", {"drop_path_rate": 0.3}),
    ],
)
def test_the_models_own_hook_keeps_masks_and_statistics(name, options):
    assert assert_recompute_changes_nothing(name, 64, **options).by_model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_timm_family_has_its_hook_or_is_wrapped():
    families = {}
    for name in timm.list_models():
        if _registry._model_entrypoints[name].__module__.startswith("timm."):  # none of the tests'
            families.setdefault(_registry._model_to_module[name], name)
    refusing = 0
    for family, name in families.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        done = apply_activation_checkpointing(model)
        assert done.by_model or len(done.blocks) >= 2, family
        refusing += not done.by_model
    assert len(families) >= 98 and refusing == len(REFUSING)


def test_recompute_costs_one_forward_more():
    flops = []
    for wraps in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)])
        if wraps:
            apply_activation_checkpointing(model, blocks=["0", "1", "2", "3"])
        loss = model(torch.randn(2, 8)).sum()
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        flops.append(counter.get_total_flops())
    forward = 4 * 2 * 2 * 8 * 8
    assert flops[1] - flops[0] == forward


def test_frozen_stems_still_let_gradients_through():
    model = timm.create_model("vgg11_bn", num_classes=3)
    apply_activation_checkpointing(model)
    for parameter in model.features[:8].parameters():
        parameter.requires_grad_(False)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_evaluation_recomputes_nothing_and_twice_is_once():
    model = timm.create_model("vgg11_bn", num_classes=3).eval()
    first = apply_activation_checkpointing(model)
    assert apply_activation_checkpointing(model).blocks == first.blocks
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    wrapped = counter.get_total_flops()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        timm.create_model("vgg11_bn", num_classes=3).eval()(x)
    assert wrapped == counter.get_total_flops()


def test_blocks_by_name_and_unknown_names():
    model = timm.create_model("resnet18", num_classes=3)
    done = apply_activation_checkpointing(model, blocks=["layer1", "layer2.0"])
    assert done.blocks == ("layer1", "layer2.0")
    with pytest.raises(InputError, match=r"\['layer9'\] are no modules of ResNet.*layer4"):
        apply_activation_checkpointing(model, blocks=["layer9"])
    with pytest.raises(InputError, match="has no blocks"):
        apply_activation_checkpointing(nn.Linear(2, 2))
