"""Which pretrained backbone is at hand: a file given, timm's weights in a cache, or reachable."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from timm.models import PretrainedCfg

from lbaccel.errors import InputError
from lbaccel.models import model_options

# From small to large; the first for a processor, the last for a GPU of 6 GiB and more.
CANDIDATES = (
    "mobilenetv3_large_100.ra_in1k",
    "resnet50.a1_in1k",
    "convnext_tiny.in12k_ft_in1k",
)
_FILE = "model.safetensors"
_SECONDS = 5.0  # to answer whether a file is reachable


@dataclass(frozen=True)
class Backbone:
    """A pretrained network: its name, its file (None: timm's own), and where from, in words."""

    model: str
    checkpoint: str | None
    origin: str


def find_backbone(model: str | None, checkpoint: str | None, *, device_type: str) -> Backbone:
    """The backbone to start from, with what was pinned of it.

    Args:
        model: its name in timm, or None for the first of `CANDIDATES` that is at hand.
        checkpoint: a file of its weights, or None for timm's own. Without `model` the name of the
            file must hold that of the network.
        device_type: "cpu" takes the smallest candidate first, any other the largest.

    Raises:
        InputError: no such weights here or reachable; the text names the file and where to put it.
    """
    if checkpoint is not None:
        name = model or model_in_name(Path(checkpoint))
        if name is None:
            raise InputError(
                f"--checkpoint {checkpoint} does not say which network it is of. Add --model, such "
                "as --model mobilenetv2_100."
            )
        return Backbone(name, checkpoint, f"weights of {checkpoint}")
    order = CANDIDATES if device_type == "cpu" else CANDIDATES[::-1]
    names = (model,) if model is not None else order
    for look in (_cached, _reachable):
        for name in names:
            config = _config(name)
            if (origin := look(config)) is not None:
                return Backbone(name, None, origin)
    raise InputError(_nowhere(names))


def model_in_name(path: Path) -> str | None:
    """The longest name of a timm model that the name of a file holds, between other signs.

    >>> model_in_name(Path("timm_mobilenetv2_100_imagenet.safetensors"))
    'mobilenetv2_100'
    >>> model_in_name(Path("weights.pth"))
    """
    text = f"_{re.sub(r'[^0-9a-z]+', '_', path.stem.lower())}_"
    found = [name for name in timm.list_models() if f"_{name}_" in text]
    return max(found, key=len, default=None)


def _config(name: str) -> PretrainedCfg:
    model_options(name, num_classes=1)  # says where there is no such model or tag
    config = timm.get_pretrained_cfg(name)
    if config is None or not (config.hf_hub_id or config.url):
        raise InputError(
            f"--model {name} has no pretrained weights in timm. Give a file of them with "
            "--checkpoint, or train it from scratch with lbaccel train."
        )
    return config


def _cached(config: PretrainedCfg) -> str | None:
    if config.hf_hub_id:
        found = try_to_load_from_cache(config.hf_hub_id, config.hf_hub_filename or _FILE)
        if isinstance(found, str):
            return f"timm's weights in {found}"
    if config.url:
        file = Path(torch.hub.get_dir(), "checkpoints", Path(str(config.url)).name)
        if file.is_file():
            return f"timm's weights in {file}"
    return None


def _reachable(config: PretrainedCfg) -> str | None:
    if not config.hf_hub_id or constants.HF_HUB_OFFLINE:
        return None
    url = hf_hub_url(config.hf_hub_id, config.hf_hub_filename or _FILE)
    try:
        size = get_hf_file_metadata(url, timeout=_SECONDS).size or 0
    except Exception:  # no network, no such file, a proxy's answer: one is as good as the other
        return None
    return f"timm's weights, a download of {size / 2**20:.0f} MiB from {config.hf_hub_id}"


def _nowhere(names: tuple[str, ...]) -> str:
    config = _config(names[0])
    where = Path(constants.HF_HUB_CACHE)
    return (
        f"pretrained weights of {' or '.join(names)} are neither in {where} nor reachable from "
        f"here. Where there is a network: hf download {config.hf_hub_id}. Then copy the folder "
        f"models--{str(config.hf_hub_id).replace('/', '--')} into {where}; or copy its {_FILE} "
        f"anywhere, and add --model {names[0].split('.')[0]} --checkpoint FILE."
    )
