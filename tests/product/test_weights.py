"""Pretrained weights: a file, a cache, the network; or a sentence that says where to put them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lbaccel.errors import InputError
from lbaccel.product import weights
from lbaccel.product.weights import CANDIDATES, find_backbone, model_in_name

CPU_FIRST, GPU_FIRST = CANDIDATES[0], CANDIDATES[-1]


@pytest.fixture
def cached(monkeypatch, tmp_path):
    """Repositories that the hub's cache has; nothing is reachable."""
    there: set[str] = set()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(
        weights,
        "try_to_load_from_cache",
        lambda repo, file: f"/c/{file}" if repo in there else None,
    )
    monkeypatch.setattr(weights, "get_hf_file_metadata", refuse)
    return there


def refuse(*_, **__):
    raise OSError("no network")


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("timm_mobilenetv2_100_imagenet.safetensors", "mobilenetv2_100"),
        ("resnet50.pth", "resnet50"),
        ("my-convnext_tiny-v2.pth", "convnext_tiny"),
        ("resnet50d_best.pth", "resnet50d"),
        ("best.pth", None),
        ("vgg.pth", None),
    ],
)
def test_the_name_of_a_file_may_say_its_network(name, model):
    assert model_in_name(Path("somewhere") / name) == model


def test_what_is_pinned_is_taken_as_it_is(cached):
    found = find_backbone("resnet18", "weights.pth", device_type="cpu")
    assert (found.model, found.checkpoint) == ("resnet18", "weights.pth")


@pytest.mark.parametrize(("device", "first"), [("cpu", CPU_FIRST), ("cuda", GPU_FIRST)])
def test_of_several_in_the_cache_the_device_decides(cached, device, first):
    cached.update(f"timm/{name}" for name in CANDIDATES)
    assert find_backbone(None, None, device_type=device).model == first


def test_a_cached_one_comes_before_a_download(cached, monkeypatch):
    monkeypatch.setattr(
        weights, "get_hf_file_metadata", lambda *_, **__: SimpleNamespace(size=22 * 2**20)
    )
    cached.add(f"timm/{CANDIDATES[1]}")
    assert find_backbone(None, None, device_type="cpu").model == CANDIDATES[1]
    cached.clear()
    found = find_backbone(None, None, device_type="cpu")
    assert found.model == CPU_FIRST and "a download of 22 MiB from timm/" in found.origin


def test_torchs_own_cache_counts_too(cached, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mobilenetv2_100_ra-b33bc2c4.pth").touch()
    assert "mobilenetv2_100_ra-b33bc2c4.pth" in (
        find_backbone("mobilenetv2_100", None, device_type="cpu").origin
    )


def test_offline_nobody_is_asked(cached, monkeypatch):
    monkeypatch.setattr(weights.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(weights, "get_hf_file_metadata", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(InputError, match="neither in"):
        find_backbone(None, None, device_type="cpu")


def test_nowhere_is_a_sentence_with_file_and_place(cached):
    with pytest.raises(InputError) as caught:
        find_backbone(None, None, device_type="cpu")
    for part in (*CANDIDATES, f"hf download timm/{CPU_FIRST}", "model.safetensors", "--checkpoint"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("model", "says"), [("resnet5", "no timm model"), ("test_vit2x", "no timm model")]
)
def test_a_network_that_timm_lacks_is_refused(cached, model, says):
    with pytest.raises(InputError, match=says):
        find_backbone(model, None, device_type="cpu")
