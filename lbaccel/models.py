"""timm backbones for the recipe: weights, the stem for small images, preprocessing."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import get_token
from timm.data.config import resolve_model_data_config
from timm.models.efficientnet import EfficientNet
from timm.models.resnet import ResNet
from torch import Tensor, nn

from lbaccel import networks
from lbaccel.errors import CannotRead, InputError, RunFailed, brief, reading
from lbaccel.network_build import check_room, try_arguments
from lbaccel.text import printable, without_tokens
from lbaccel.torch_files import check_torch_file

OWN_NETWORKS = tuple(networks.__all__)  # that timm builds once lbaccel.networks is imported
MOST_EXPANDED = 64 * 2**20  # bytes of a view over fewer, such as an expanded buffer
# A tensor of this name beside exported weights stops every loader whose network has another stem.
STEM_MARK = "needs_lbaccel_models_adapt_stem"


def create_backbone(
    name: str,
    *,
    num_classes: int,
    num_channels: int = 3,
    img_size: int | None = None,
    pretrained: bool = False,
    checkpoint: Path | None = None,
    drop_rate: float = 0.0,
    drop_path: float = 0.0,
    arguments: Mapping[str, Any] | None = None,
    described: nn.Module | None = None,
) -> nn.Module:
    """A timm model, with its own pretrained weights, those of a file, or fresh ones.

    `pretrained` with `checkpoint` reads the file as pretrained weights: timm adapts channels and
    puts in a new classifier where the number of classes differs. `checkpoint` alone must fit the
    model exactly. `arguments` are the network's own, as `network_arguments` gives them;
    `described` is what `try_arguments` gave for them, where the caller has tried them before.

    Raises:
        InputError: an unknown model, arguments that it does not take, or weights that do not fit.
        RunFailed: pretrained weights that can't be downloaded.
    """
    options = model_options(
        name, num_classes=num_classes, num_channels=num_channels, img_size=img_size
    )
    if drop_rate:
        options["drop_rate"] = drop_rate
    if drop_path:
        options["drop_path_rate"] = drop_path
    if arguments:
        if described is None:
            described = try_arguments(name, arguments, options)
        check_room(name, arguments, described)
        options |= arguments
    weights = None
    if checkpoint is not None:
        weights = read_weights(checkpoint)
        if pretrained:
            options["pretrained_cfg_overlay"] = {"state_dict": weights}
    try:
        model: Any = timm.create_model(name, pretrained=pretrained, **options)
    except (OSError, ConnectionError) as error:
        reason = without_tokens(str(error), get_token())
        raise RunFailed(
            f"pretrained weights of {name} can't be had: {reason}. Without a network, give a file: "
            "--pretrained --checkpoint PATH."
        ) from error
    except RuntimeError as error:
        if weights is None:
            if pretrained and "pretrained" in str(error).lower():
                reason = without_tokens(str(error), get_token())
                raise InputError(f"{name} has no pretrained weights: {reason}") from error
            if pretrained and arguments:
                raise InputError(_other_network(name, arguments, error)) from error
            raise
        raise InputError(_misfit(name, error=error, path=checkpoint)) from error
    except TypeError as error:
        raise InputError(f"{name} does not take one of {sorted(options)}: {error}.") from error
    if weights is not None:
        if pretrained:
            model.pretrained_cfg.pop("state_dict", None)
            _check_taken(model, weights, name, checkpoint)
        else:
            load_exactly(model, weights, name, checkpoint)
    return model


def model_options(
    name: str, *, num_classes: int, num_channels: int = 3, img_size: int | None = None
) -> dict[str, Any]:
    """Arguments of timm.create_model besides the name; img_size only where it shapes the network.

    Raises:
        InputError: an unknown model or tag.

    >>> model_options("resnet18", num_classes=10, img_size=64)
    {'num_classes': 10, 'in_chans': 3}
    """
    if not timm.is_model(name.split(".")[0]):
        near = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        raise InputError(f"model={name!r} is no timm model.{hint} timm.list_models() has them all.")
    options: dict[str, Any] = {"num_classes": num_classes, "in_chans": num_channels}
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError as error:  # a tag, what follows the dot, that there is none of
        tags = timm.list_pretrained(f"{name.split('.')[0]}.*")
        raise InputError(f"model={name!r}: {error} It has: {', '.join(tags) or 'none'}.") from error
    if img_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = img_size
    return options


def read_torch(path: Path) -> Any:
    """The content of a torch file, read with `weights_only=True`: it executes nothing.

    Raises:
        CannotRead: the system refuses.
        InputError: the file is damaged, or holds more than tensors and plain values.
    """
    reason = ""
    try:
        with reading(path):
            try:
                check_torch_file(path)
            except ValueError as error:
                reason = str(error)
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except CannotRead:
        raise
    except Exception as error:  # torch's own text is long, and tells to read the file unsafely
        raise InputError(
            f"{path} can't be read as weights or state: "
            f"{reason or 'torch.load(..., weights_only=True) refuses it'}. It is damaged, or holds "
            "more than tensors and plain values."
        ) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file.

    Raises:
        CannotRead: the system refuses.
        InputError: the file is cut off, or is none of this format.
    """
    try:
        with reading(path):
            return safetensors.torch.load_file(path)
    except CannotRead:
        raise
    except Exception as error:  # of the format's own library: many kinds, none of them promised
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"{path} can't be read as weights: {printable(reason[0][:200])}. It is damaged, or was "
            "written by another program."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a torch file read with `weights_only=True`.

    Raises:
        CannotRead: the system refuses.
        InputError: no file, or none of tensors alone.
    """
    if not path.is_file():
        raise InputError(f"checkpoint={path} is no file.")
    read = read_tensors if path.suffix == ".safetensors" else read_torch
    try:
        content: Any = read(path)
    except CannotRead:
        raise
    except InputError as error:
        raise InputError(
            f"checkpoint={error} Give a .safetensors file, or a torch file of tensors alone."
        ) from error
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise InputError(f"checkpoint={path} holds no state_dict of tensors.")
    for key, value in content.items():
        _check_backed(path, str(key), value)
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _check_backed(path: Path, key: str, value: Tensor) -> None:
    """A view may claim any shape over a few bytes (stride 0): its first copy takes all memory."""
    if value.layout is not torch.strided or value.is_meta:
        raise InputError(f"checkpoint={path}: {brief(key)} holds no values of its own.")
    claimed, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
    if claimed > max(held, MOST_EXPANDED):
        raise InputError(
            f"checkpoint={path}: {brief(key)} of shape {tuple(value.shape)} claims {claimed:,} "
            f"bytes, and the file holds {held:,} of them. Write it anew with .clone()."
        )


def load_exactly(
    model: nn.Module, weights: Mapping[str, Tensor], name: str, path: Path | None
) -> None:
    """Load `weights` into a model of the same names and shapes.

    Raises:
        InputError: a tensor is missing, unknown or of another shape; the text names it.
    """
    own = model.state_dict()
    wrong = [
        f"{key} is {tuple(weights[key].shape)}, the model's {tuple(value.shape)}"
        for key, value in own.items()
        if key in weights and weights[key].shape != value.shape
    ]
    missing = [key for key in own if key not in weights]
    accepted = {*own, *([STEM_MARK] if getattr(model, "small_stem", False) else [])}
    extra = [key for key in weights if key not in accepted]
    problems = wrong + [f"{key} is missing" for key in missing] + [f"{k} is unknown" for k in extra]
    if problems:
        shown = "; ".join(problems[:3]) + (f"; {len(problems) - 3} more" * (len(problems) > 3))
        raise InputError(
            f"checkpoint={path} does not fit {name}: {shown}. To start from it with a new "
            "classifier, add --pretrained; else give the model and --stem it was trained with."
        )
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:  # of a kind that can't be copied: quantized, without memory
        raise InputError(_misfit(name, error=error, path=path)) from error


def _check_taken(
    model: nn.Module, weights: Mapping[str, Tensor], name: str, path: Path | None
) -> None:
    """Stop where most weights are not in the file: with a new classifier timm lets names differ.

    Compared by value, since timm renames those of other code bases. A first convolution for other
    channels and resampled position embeddings are few.
    """
    given = {(v.numel(), v.double().sum().item()) for v in weights.values()}
    own = [v for v in model.state_dict().values() if v.ndim > 1]
    taken = sum((v.numel(), v.double().sum().item()) in given for v in own)
    if taken < len(own) / 2:
        raise InputError(
            f"checkpoint={path} does not fit {name}: {taken} of the model's {len(own)} weight "
            "tensors are in it. Give the model that it was trained with."
        )


def _other_network(name: str, arguments: Mapping[str, Any], error: Exception) -> str:
    reason = printable(" ".join(str(error).split())[:200].rstrip("."))
    return (
        f"--model-kwargs {brief(dict(arguments))} makes another network of {name}, which its "
        f"pretrained weights do not fit: {reason}. Leave --pretrained out, or these arguments."
    )


def _misfit(name: str, *, error: Exception, path: Path | None) -> str:
    reason = printable(" ".join(str(error).split())[:300])
    return f"checkpoint={path} does not fit {name}: {reason}"


def adapt_stem(model: nn.Module) -> str | None:
    """Make a ResNet or MobileNetV2 fit small images, in place; None for other families.

    ResNet: the first convolution has stride 1 (a plain 7 x 7 becomes a fresh 3 x 3), and there is
    no max pooling (He et al. 2016, section 4.2). MobileNetV2: the first convolution and the first
    block with stride have stride 1.

    A file of `lbaccel export` holds the tensor `STEM_MARK` where the network had this stem: it
    loads after this call, and before it strict loading fails at an unexpected key.

    Returns:
        The change, in words.
    """
    net: Any = model
    done = _adapt(net)
    if done is not None:
        net.small_stem = True
        net.register_load_state_dict_pre_hook(_drop_stem_mark)
    return done


def _drop_stem_mark(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(prefix + STEM_MARK, None)


def _adapt(model: nn.Module) -> str | None:
    net: Any = model
    if isinstance(model, ResNet) and isinstance(net.maxpool, nn.MaxPool2d):
        if isinstance(net.conv1, nn.Sequential):
            first: Any = net.conv1[0]
            first.stride = (1, 1)
            what = "conv1.0 has stride 1"
        else:
            old = net.conv1
            net.conv1 = nn.Conv2d(
                old.in_channels, old.out_channels, 3, stride=1, padding=1, bias=False
            )
            nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
            what = "conv1 is a fresh 3x3 of stride 1"
        net.maxpool = nn.Identity()
        return f"{what}, no max pooling"
    if isinstance(model, EfficientNet) and net.pretrained_cfg["architecture"].startswith(
        "mobilenetv2"
    ):
        net.conv_stem.stride = (1, 1)
        strided = next(
            module
            for name, module in net.blocks.named_modules()
            if name.endswith("conv_dw") and module.stride != (1, 1)
        )
        strided.stride = (1, 1)
        return "conv_stem and the first strided block have stride 1"
    return None


def preprocessing(
    model: nn.Module, *, num_channels: int = 3, given: Mapping[str, Any] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Mean, std, interpolation and crop share of the backbone's data config, and their origins.

    Values in `given` that are not None win. With one channel, mean and std are averaged.

    Raises:
        InputError: a mean or std of another length than the images' channels.
    """
    config = resolve_model_data_config(model)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for key in ("mean", "std", "interpolation", "crop_pct"):
        value = (given or {}).get(key)
        if value is not None:
            values[key], origins[key] = value, "flag"
            continue
        value = config[key]
        if key in ("mean", "std") and len(value) != num_channels:
            value = (sum(value) / len(value),) * num_channels
        values[key], origins[key] = value, "the backbone's data config"
    if values["interpolation"] not in ("bilinear", "bicubic"):
        values["interpolation"] = "bicubic"
    for key in ("mean", "std"):
        found = tuple(float(x) for x in values[key])
        if len(found) == 1:
            found = found * num_channels
        if len(found) != num_channels:
            raise InputError(
                f"{key} has {len(found)} values, but the images have {num_channels} "
                f"channel{'s' * (num_channels > 1)}. Give 1"
                + (f" or {num_channels} values." if num_channels > 1 else " value.")
            )
        values[key] = found
    if min(values["std"]) <= 0:
        raise InputError(f"std={values['std']}: every value must be above 0.")
    return values, origins
