"""The backbone that the recipe builds, and all that evaluation must know of its input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.data.config import resolve_model_data_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lbaccel.data.decode import DRAFT, FAST
from lbaccel.data.sources import ImageArray, ImageFiles, Source
from lbaccel.errors import InputError
from lbaccel.models import (
    adapt_stem,
    create_backbone,
    load_exactly,
    preprocessing,
    read_weights,
)
from lbaccel.network_arguments import SMALL_IMAGE
from lbaccel.optim.trained import train_only
from lbaccel.recipe.model_arguments import arguments_of
from lbaccel.recipe.options_data import DataOptions, ModelOptions
from lbaccel.runs.kinds import ARGUMENTS

Say = Callable[[str], object]
GIVEN = ("mean", "std", "interpolation", "crop_pct")
_BYTES = {  # decoders whose images are bytes
    FAST: "images are resized and coloured as bytes (pillow: timm's transform)",
    DRAFT: "as fast, and a JPEG much larger than its crop needs is decoded at a smaller size",
}


def build_model(
    options: ModelOptions,
    data: DataOptions,
    source: Source,
    *,
    num_classes: int,
    bn_momentum: float | None = None,
    say: Say,
    load_weights: bool = True,
) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone and what evaluation needs to know of its input; says where each comes from.

    Without `load_weights` (a resume brings its own) it is built alike, with fresh weights.
    """
    size, origin = data.img_size, "flag"
    if size is None and isinstance(source.train, ImageArray):
        size, origin = source.train.images.shape[-1], "the images' own"
    arguments = arguments_of(options)
    path = Path(options.checkpoint) if options.checkpoint is not None and load_weights else None
    # Weights that must fit exactly are read after the stem is what they were trained with.
    weights = None if path is None or options.pretrained else read_weights(path)
    model = create_backbone(
        options.model,
        num_classes=num_classes,
        num_channels=source.num_channels,
        img_size=size,
        pretrained=options.pretrained and load_weights,
        checkpoint=path if options.pretrained else None,
        drop_rate=options.drop_rate,
        drop_path=options.drop_path,
        arguments=arguments,
    )
    if options.pretrained and load_weights and options.head_init == "zero":
        _start_new_classifier(model, num_classes, say=say)
    if bn_momentum is not None:
        _set_bn_momentum(model, bn_momentum, options.model)
    if size is None:
        size, origin = resolve_model_data_config(model)["input_size"][-1], "the model's"
    stem = "native"
    if data.stem == "small" or (
        data.stem == "auto" and size < SMALL_IMAGE and not options.pretrained
    ):
        done = adapt_stem(model)
        if done is None and data.stem == "small":
            raise InputError(
                f"--stem small: {options.model} is no ResNet or MobileNetV2. Leave it out."
            )
        if done is not None:
            stem = "small"
            say(
                f"stem: small, for images below {SMALL_IMAGE} px: {done} (plain timm needs "
                "lbaccel.models.adapt_stem before it loads the checkpoint)"
            )
    if path is not None and weights is not None:
        load_exactly(model, weights, options.model, path)
    _try_images(
        model,
        options.model,
        num_channels=source.num_channels,
        size=size,
        num_classes=num_classes,
    )
    given = {key: getattr(data, key) for key in GIVEN}
    values, origins = preprocessing(model, num_channels=source.num_channels, given=given)
    if isinstance(source.train, ImageArray):
        values["crop_pct"] = 1.0  # evaluation takes images in memory whole
    shown = ", ".join(
        f"{key} {_short(values[key])} ({origins[key]})" for key in ("mean", "std", "interpolation")
    )
    num_parameters = sum(p.numel() for p in model.parameters())
    say(f"model: {options.model}, {num_parameters / 1e6:.2f} M parameters, {num_classes} classes")
    trains = train_only(model, options.train)
    if trains is not None:
        say(trains)
    say(f"images: {size} px ({origin}), {shown}")
    if isinstance(source.train, ImageFiles) and data.decoder_used in _BYTES:
        say(f"decoder: {data.decoder_used}, {_BYTES[data.decoder_used]}")
    values |= {"exif_orientation": data.exif_orientation, "decoder": data.decoder_used}
    if arguments:
        values[ARGUMENTS] = arguments
    values |= {"img_size": size, "num_channels": source.num_channels, "stem": stem}
    return model, values | {"model": options.model, "num_classes": num_classes}


def _start_new_classifier(model: nn.Module, num_classes: int, *, say: Say) -> None:
    """Zero the layer that gives the logits, where it is not the pretrained one.

    All logits are then 0, and the first loss is ln(classes) (Kolesnikov et al. 2020, "Big
    Transfer"; Dosovitskiy et al. 2021, section 3.2), whatever a network draws its classifier from.
    """
    config: Any = getattr(model, "pretrained_cfg", {})
    if config.get("num_classes") == num_classes:  # where timm keeps the pretrained one
        return
    last = _logit_layers(model, num_classes)
    for layer in last:
        for parameter in layer.parameters(recurse=False):
            nn.init.zeros_(parameter)
    if last:
        say(f"classifier: new, for {num_classes} classes, all zero (--head-init model: as drawn)")
    else:
        say(f"classifier: new, for {num_classes} classes, as the model draws it")


def _logit_layers(model: nn.Module, num_classes: int) -> list[nn.Module]:
    """The last linear layer, or 1 x 1 convolution, of each classifier that timm names."""
    getter: Any = getattr(model, "get_classifier", lambda: None)
    found = getter()
    last = []
    for classifier in found if isinstance(found, (tuple, list)) else [found]:
        layers = [
            layer
            for layer in (classifier.modules() if isinstance(classifier, nn.Module) else ())
            if num_classes in (getattr(layer, "out_features", 0), getattr(layer, "out_channels", 0))
        ]
        last += layers[-1:]
    return last


def _set_bn_momentum(model: nn.Module, momentum: float, name: str) -> None:
    layers = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not layers:
        raise InputError(f"--bn-momentum {momentum:g}: {name} has no BatchNorm. Leave it out.")
    for layer in layers:
        layer.momentum = momentum


def _try_images(
    model: nn.Module, name: str, *, num_channels: int, size: int, num_classes: int
) -> None:
    """One black image in evaluation mode: a size that the network can't take is found here."""
    was_training = model.training
    try:
        with torch.no_grad():
            logits: Any = model.eval()(torch.zeros(1, num_channels, size, size))
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise InputError(
            f"{name} can't take images of {size} px: {reason}. Give another --img-size."
        ) from error
    finally:
        model.train(was_training)
    shape = tuple(getattr(logits, "shape", ()))
    if shape != (1, num_classes):
        raise InputError(
            f"{name} answers an image by {shape or type(logits).__name__}, and not by (1, "
            f"{num_classes}), a number a class. Give other --model-kwargs, or another --model."
        )


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "(" + ", ".join(f"{x:.3f}" for x in value) + ")"
    return str(value)
