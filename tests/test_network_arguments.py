"""Arguments of a network: read as plain values, and tried without memory."""

from __future__ import annotations

import json

import pytest
import timm
import torch
import torchvision
import yaml

from lbaccel import network_build
from lbaccel.errors import InputError
from lbaccel.models import create_backbone
from lbaccel.network_arguments import as_words, network_arguments
from lbaccel.runs.folder import plain

WORDS = ["stem=8", "widths=(8,16,32)", "zero_init_last=False", "act=gelu", "eps=1e-5", "tag='8'"]


def refusal(raw):
    with pytest.raises(InputError) as caught:
        network_arguments(raw)
    return str(caught.value)


def build(name, arguments, **options):
    return create_backbone(name, num_classes=10, arguments=network_arguments(arguments), **options)


def test_words_yaml_and_json_give_the_same_arguments():
    typed = network_arguments(WORDS)
    assert typed == {
        "stem": 8,
        "widths": (8, 16, 32),
        "zero_init_last": False,
        "act": "gelu",
        "eps": 1e-5,
        "tag": "8",
    }
    written = "{stem: 8, widths: [8, 16, 32], zero_init_last: no, act: gelu, eps: 1e-5, tag: '8'}"
    assert network_arguments(yaml.safe_load(written)) == typed
    assert network_arguments(json.loads(json.dumps(plain(typed)))) == typed
    assert network_arguments(as_words(typed)) == typed
    assert network_arguments({}) is network_arguments(["none"]) is None


def test_the_text_of_a_value_is_never_run():
    text = "__import__('os').abort()"
    assert network_arguments([f"stem={text}"]) == {"stem": text}
    assert network_arguments(["stem=9**9**9"]) == {"stem": "9**9**9"}


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (["stem"], ["no key=value", "stem=8"]),
        (["stem=1", "stem=2"], ["stem twice"]),
        (["num_classes=3"], ["num_classes", "--num-classes"]),
        (["img_size=32"], ["--img-size"]),
        (["drop_path_rate=0.1"], ["--drop-path "]),
        (["in_chans=1"], ["channels follow the data"]),
        (["pretrained_cfg_overlay={'file': 'x'}"], ["none of the network's own"]),
        (["stem=None"], ["asks for nothing"]),
        (["stem=1e400"], ["no number"]),
        ({"stem": 2**60}, ["-2^53 to 2^53"]),
        ({"stem": "x" * 5000}, ["5,000 characters"]),
        (["stem=" + "(" * 900 + ")" * 900], ["1,800 characters"]),
        ({"widths": [[[[[[8]]]]]]}, ["too large"]),
        ({"widths": list(range(101))}, ["at most 100 values"]),
        ({f"a{i}": i for i in range(101)}, ["101 arguments"]),
        ({3: 4}, ["no name of an argument"]),
        (["ste m=4"], ["no name of an argument"]),
        ({"stem": b"8"}, ["no number, text"]),
        (8, ["no mapping"]),
    ],
)
def test_what_is_no_plain_argument_is_one_sentence(raw, words):
    text = refusal(raw)
    assert "--model-kwargs" in text and "\n" not in text and len(text) < 400
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("cifar_resnet8", {"stme": 8}, ["stme=8", "Did you mean stem?", "widths, zero_init_last"]),
        ("cifar_resnet8", {"widths": 8}, ["can't be built with {'widths': 8}"]),
        ("cifar_resnet8", {"stem": 2**40}, ["values", "the most"]),
        ("cifar_resnet8", {"zero_init_last": "no"}, ["True or False"]),
        ("test_vit", {"zero_init_last": False}, ["--zero-init-last: test_vit has no such"]),
        ("test_vit", {"dept": 3}, ["Did you mean depth?"]),
        ("test_efficientnet", {"nonsense": 3}, ["nonsense=3", "takes no such argument"]),
        ("regnetx_002", {"nonsense": 3}, ["nonsense"]),
        ("poolformer_s12", {"drop_rates": 3}, ["poolformer_s12 takes no such argument", "depths"]),
        ("hrnet_w18_small", {"head_": "x"}, ["hrnet_w18_small takes no such argument", "head"]),
    ],
)
def test_an_argument_that_the_network_does_not_take_is_one_sentence(name, arguments, words):
    with pytest.raises(InputError) as caught:
        build(name, arguments)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text


def test_a_network_that_does_not_fit_into_memory_is_a_sentence_with_the_numbers(monkeypatch):
    monkeypatch.setattr(network_build, "host_memory", lambda: (2**30, 2**34))
    words = r"stem.: 20000000.* has 3,\d+,\d+,\d+ values, which need 1\d\.\d GiB in float32, and "
    with pytest.raises(InputError, match=rf"{words}1\.0 GiB of this machine's memory are free"):
        build("cifar_resnet8", ["stem=20000000"])
    with torch.device("meta"):
        build("cifar_resnet8", ["stem=20000000"])  # a plan needs no memory
    build("cifar_resnet8", ["stem=8"])


def test_the_trial_without_memory_moves_no_random_number():
    torch.manual_seed(3)
    ours = build("cifar_resnet8", {"stem": 8}).state_dict()
    torch.manual_seed(3)
    plain = timm.create_model("cifar_resnet8", num_classes=10, stem=8).state_dict()
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[key], plain[key]) for key in ours)


def test_pretrained_weights_that_do_not_fit_the_arguments_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("cifar_resnet8", num_classes=10).state_dict(), path)
    with pytest.raises(InputError, match=r"do(es)? not fit"):
        build("cifar_resnet8", {"stem": 8}, pretrained=True, checkpoint=path)


def test_resnet18_without_zero_init_last_is_torchvisions():
    """The same names, the same function of the same weights, and the same law of their start."""
    torch.manual_seed(0)
    ours = create_backbone("resnet18", num_classes=10, arguments={"zero_init_last": False})
    theirs = torchvision.models.resnet18(num_classes=10)
    own, other = ours.state_dict(), theirs.state_dict()
    assert own.keys() == other.keys()
    for name, value in own.items():
        if value.ndim == 4:  # normal of deviation sqrt(2 / fan out)
            fan_out = value.shape[0] * value.shape[2] * value.shape[3]
            for drawn in (value, other[name]):
                within = 5 * (2 * drawn.numel()) ** -0.5
                assert drawn.std() == pytest.approx((2 / fan_out) ** 0.5, rel=within), name
                assert drawn.mean().abs() < 5 * (2 / fan_out / drawn.numel()) ** 0.5, name
        elif name.startswith("fc."):  # uniform within 1 / sqrt(512)
            assert max(value.abs().max(), other[name].abs().max()) <= 512**-0.5
        else:
            assert torch.equal(value, other[name]), f"{name}: a gain, a shift or a statistic"
    last = own["layer1.0.bn2.weight"]
    default = create_backbone("resnet18", num_classes=10).state_dict()["layer1.0.bn2.weight"]
    assert last.eq(1).all() and default.eq(0).all()

    ours.load_state_dict(other)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    for train in (True, False):
        ours.train(train), theirs.train(train)
        assert torch.equal(ours(images), theirs(images))
