"""Backbones: weights that fit or are refused, the stem for small images, preprocessing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import recipes
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lbaccel.data.sources import open_source
from lbaccel.errors import InputError
from lbaccel.models import adapt_stem, create_backbone, preprocessing, read_weights
from lbaccel.recipe.model import _logit_layers, build_model


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def weights_of(name="test_resnet", seed=7, **options):
    torch.manual_seed(seed)
    return timm.create_model(name, **options).state_dict()


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet19", ["'resnet19' is no timm model", "resnet18"]),
        ("", ["'' is no timm model"]),
        ("resnet10t.nonsense", ["nonsense", "resnet10t.c3_in1k"]),
    ],
)
def test_an_unknown_model_or_tag_is_refused_with_what_there_is(name, words):
    with pytest.raises(InputError) as caught:
        create_backbone(name, num_classes=2)
    for word in words:
        assert word in str(caught.value)


def test_dropout_rates_reach_the_model():
    model = create_backbone("test_vit", num_classes=2, drop_rate=0.25, drop_path=0.5)
    assert model.head_drop.p == 0.25
    assert model.blocks[-1].drop_path1.drop_prob == 0.5


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".ema.pth", ".ddp.pth"])
def test_weights_are_read_from_each_kind_of_file(suffix):
    truth = weights_of(num_classes=3)
    path = Path("w" + suffix)
    if suffix == ".safetensors":
        save_file(truth, path)
    elif suffix == ".pth":
        torch.save(truth, path)
    elif suffix == ".ema.pth":  # timm's train.py: the average is the better one
        torch.save({"state_dict": weights_of(seed=8), "state_dict_ema": truth}, path)
    else:
        torch.save({"model": {f"module.{k}": v for k, v in truth.items()}}, path)
    found = read_weights(path)
    assert found.keys() == truth.keys()
    assert all(torch.equal(found[k], truth[k]) for k in truth)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_garbage_is_refused_without_advice_to_read_it_unsafely(suffix):
    Path("w" + suffix).write_bytes(b"garbage")
    with pytest.raises(InputError, match=r"can't be read as weights.*Give a \.safetensors") as e:
        read_weights(Path("w" + suffix))
    assert "weights_only` set to `False" not in str(e.value) and "\n" not in str(e.value)


def test_a_file_that_would_run_code_is_refused_and_not_run():
    class Bomb:
        def __reduce__(self):
            return Path("exploded").touch, ()

    torch.save({"state_dict": Bomb()}, "w.pth")
    with pytest.raises(InputError, match="can't be read as weights"):
        read_weights(Path("w.pth"))
    assert not Path("exploded").exists()


def test_a_file_without_a_state_dict_is_refused():
    torch.save({"state_dict": {"a": 1}}, "w.pth")
    with pytest.raises(InputError, match="no state_dict of tensors"):
        read_weights(Path("w.pth"))


def test_weights_alone_must_fit_exactly_and_every_misfit_is_counted():
    weights = weights_of(num_classes=3)
    del weights["layer1.0.bn1.bias"]
    weights["odd"] = torch.zeros(1)
    save_file(weights, "w.safetensors")
    with pytest.raises(InputError) as caught:
        create_backbone("test_resnet", num_classes=2, checkpoint=Path("w.safetensors"))
    text = str(caught.value)
    for word in ("fc.weight is (3, ", "fc.bias is (3,)", "layer1.0.bn1.bias is missing", "1 more"):
        assert word in text


def test_pretrained_weights_of_a_file_get_a_new_classifier_and_other_channels():
    save_file(weights_of(num_classes=3), "w.safetensors")
    model = create_backbone(
        "test_resnet", num_classes=2, num_channels=1, pretrained=True,
        checkpoint=Path("w.safetensors"),
    )  # fmt: skip
    truth, found = weights_of(num_classes=3), model.state_dict()
    for key in truth:
        if key == "conv1.0.weight":  # one channel: timm sums the three
            torch.testing.assert_close(found[key], truth[key].sum(1, keepdim=True))
        elif not key.startswith("fc."):
            assert torch.equal(found[key], truth[key]), key
    assert found["fc.weight"].shape[0] == 2
    assert "state_dict" not in model.pretrained_cfg  # it would be carried along for ever


def test_pretrained_weights_of_another_network_are_refused():
    save_file(weights_of("test_vit", num_classes=3), "w.safetensors")
    with pytest.raises(InputError, match=r"w\.safetensors does not fit test_resnet"):
        create_backbone(
            "test_resnet", num_classes=2, pretrained=True, checkpoint=Path("w.safetensors")
        )


def settings_of(*flags):
    found = recipes.settings_of("--model", "resnet18", *flags)
    return found.model, found.data


def test_a_checkpoint_with_a_small_stem_fits_the_run_that_it_came_from():
    source, said = open_source("digits"), []
    model, values = build_model(*settings_of(), source, num_classes=10, say=said.append)
    assert values["stem"] == "small" and any(line.startswith("stem: small") for line in said)
    save_file(model.state_dict(), "w.safetensors")
    flags = ["--checkpoint", "w.safetensors"]
    again, _ = build_model(*settings_of(*flags), source, num_classes=10, say=said.append)
    truth, found = model.state_dict(), again.state_dict()
    assert all(torch.equal(truth[k], found[k]) for k in truth)
    with pytest.raises(InputError, match=r"conv1\.weight is \(64, 1, 3, 3\), the model's"):
        build_model(*settings_of(*flags, "--stem", "native"), source, num_classes=10, say=print)


def pretrained_as(name, head_init, *, num_classes=10, load_weights=True):
    """What `build_model` makes of a file of ImageNet's 1,000 classes, and what it says."""
    file, said = Path(f"{name}.safetensors"), []
    if not file.exists():
        save_file(timm.create_model(name).state_dict(), file)
    flags = ["--model", name, "--pretrained", "--checkpoint", str(file), "--img-size", "64"]
    found = recipes.settings_of(*flags, "--head-init", head_init)
    torch.manual_seed(3)
    model, _ = build_model(
        found.model,
        found.data,
        open_source("digits"),
        num_classes=num_classes,
        say=said.append,
        load_weights=load_weights,
    )
    return model.eval(), [line for line in said if line.startswith("classifier")]


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
def test_a_new_classifier_starts_at_chance_and_learns(name):
    """Every logit is 0, the loss ln(classes); all else is as timm makes it."""
    model, said = pretrained_as(name, "zero")
    drawn, unsaid = pretrained_as(name, "model")
    images, labels = torch.rand(4, 1, 64, 64), torch.arange(4)
    logits = model(images)
    assert not logits.any() and drawn(images).any()
    assert said == ["classifier: new, for 10 classes, all zero (--head-init model: as drawn)"]
    assert unsaid == []
    changed = {
        k for k, v in drawn.state_dict().items() if not torch.equal(v, model.state_dict()[k])
    }
    assert changed and all(name.startswith(("classifier", "head")) for name in changed)
    torch.nn.functional.cross_entropy(logits, labels).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert changed <= moved


def test_the_last_layer_of_each_of_a_networks_classifiers_is_zeroed():
    with torch.device("meta"):  # two linear layers, each behind a BatchNorm that is part of it
        model = timm.create_model("levit_128s", num_classes=7)
    names = dict(model.named_modules())
    assert [names[k] for k in ("head.linear", "head_dist.linear")] == _logit_layers(model, 7)


def test_the_pretrained_classifier_and_a_resumed_one_are_kept():
    kept, said = pretrained_as("test_resnet", "zero", num_classes=1000)
    weights = load_file("test_resnet.safetensors")
    assert torch.equal(kept.get_classifier().weight, weights["fc.weight"]) and said == []
    resumed, said = pretrained_as("test_resnet", "zero", load_weights=False)
    assert resumed.get_classifier().weight.any() and said == []


@pytest.mark.parametrize("name", ["test_vit", "vgg11"])
def test_a_size_that_the_network_can_not_take_is_found_before_training(name):
    options, data = settings_of()
    options = replace(options, model=name)
    with pytest.raises(InputError, match=rf"{name} can't take images of 8 px.*--img-size"):
        build_model(options, data, open_source("digits"), num_classes=10, say=print)


# -- the stem -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("resnet18", {"conv1.weight"}),
        ("resnet10t", set()),  # a stem of three 3x3: nothing but strides change
        ("test_resnet", set()),
        ("seresnet18", {"conv1.weight"}),
        ("mobilenetv2_035", set()),
    ],
)
def test_the_small_stem_quarters_the_stride_and_keeps_every_other_tensor(name, changed):
    model = timm.create_model(name, num_classes=2).eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.zeros(1, 3, 32, 32)
    native = model.forward_features(images).shape[-1]
    assert adapt_stem(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert {k for k in after if after[k].shape != before[k].shape} == changed
    assert all(torch.equal(after[k], before[k]) for k in after if k not in changed)
    assert model.forward_features(images).shape[-1] == 4 * native
    strides = [
        m.stride for m in model.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))
    ]  # no pooling is left, and the first convolution has stride 1
    assert strides[0] == (1, 1)
    assert not any(isinstance(m, nn.MaxPool2d) for m in model.modules())


def test_the_fresh_convolution_of_the_small_stem_is_he_normal_and_takes_grey_images():
    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=2, in_chans=1)
    adapt_stem(model)
    weight = model.conv1.weight
    assert weight.shape == (64, 1, 3, 3) and model.conv1.bias is None
    fan_out = 64 * 3 * 3  # He et al. 2015: variance 2 / fan out
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "efficientnet_b0", "regnetx_002"])
def test_other_families_are_left_alone(name):
    model = timm.create_model(name, num_classes=2)
    before = repr(model)
    assert adapt_stem(model) is None
    assert repr(model) == before


def test_adapting_twice_does_nothing_more():
    model = timm.create_model("resnet18", num_classes=2)
    adapt_stem(model)
    weight = model.conv1.weight
    adapt_stem(model)
    assert model.conv1.weight is weight


# -- preprocessing --------------------------------------------------------------------------------


def test_preprocessing_is_the_backbones_own_and_flags_win():
    model = timm.create_model("resnet18", num_classes=2)
    own = model.pretrained_cfg
    values, origins = preprocessing(model)
    assert (values["mean"], values["std"]) == (own["mean"], own["std"])
    assert (values["crop_pct"], values["interpolation"]) == (
        own["crop_pct"],
        own["interpolation"],
    )
    assert set(origins.values()) == {"the backbone's data config"}
    values, origins = preprocessing(model, given={"mean": (0.5,), "crop_pct": 1.0})
    assert values["mean"] == (0.5, 0.5, 0.5) and values["crop_pct"] == 1.0
    assert origins["mean"] == origins["crop_pct"] == "flag" != origins["std"]


def test_grey_images_take_the_average_over_the_channels():
    model = timm.create_model("resnet18", num_classes=2, in_chans=1)
    values, _ = preprocessing(model, num_channels=1)
    assert values["mean"] == (pytest.approx(sum(model.pretrained_cfg["mean"]) / 3),)


@pytest.mark.parametrize(
    ("given", "channels", "words"),
    [
        ({"mean": (0.1, 0.2)}, 3, "mean has 2 values, but the images have 3 channels. Give 1 or 3"),
        ({"std": (1, 1, 1)}, 1, "std has 3 values, but the images have 1 channel. Give 1 value."),
        ({"std": (0.0,)}, 3, "above 0"),
        ({"std": (1, -1, 1)}, 3, "above 0"),
    ],
)
def test_a_mean_or_std_that_does_not_fit_is_refused(given, channels, words):
    model = timm.create_model("test_resnet", num_classes=2)
    with pytest.raises(InputError) as caught:
        preprocessing(model, num_channels=channels, given=given)
    assert words in str(caught.value)
