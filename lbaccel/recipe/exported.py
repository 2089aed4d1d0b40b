"""A folder as `lbaccel export` and timm write it, on the disk or on the Hugging Face hub."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torch
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
)
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from lbaccel.documents import Malformed, json_in
from lbaccel.errors import InputError, RunFailed, brief
from lbaccel.models import adapt_stem, load_exactly, model_options, read_tensors
from lbaccel.recipe.options import Settings
from lbaccel.recipe.settings import from_file
from lbaccel.runs.folder import ARCHITECTURE, CONFIG, MODEL, weights_file
from lbaccel.runs.kinds import NAMES, check_kinds, check_preprocessing
from lbaccel.runs.saved_weights import check_described, dtype_of
from lbaccel.text import printable, without_tokens

HUB = "hf-hub:"
_SMALL_STEM = re.compile(r"lbaccel\.models\.adapt_stem\((.+)\)")
# of timm.create_model: they name other files, or are said by other entries
_NOT_OF_THE_NETWORK = (
    *("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
    *("num_classes", "in_chans", "img_size", "scriptable", "exportable", "no_jit"),
)


@dataclass(frozen=True, eq=False)
class ExportedModel:
    """The network of an export in evaluation mode, and how images are made ready for it.

    Args:
        model: with its weights.
        classes: names, in order of the outputs.
        preprocessing: as a checkpoint's.
        settings: of the run, where the export holds them.
    """

    model: nn.Module
    classes: list[str]
    preprocessing: dict[str, Any]
    settings: Settings | None


def from_hub(name: str) -> Path:
    """The folder of this machine that holds the files of a model of the hub, fetched where needed.

    Raises:
        InputError: no name of a model, or one without the files that an export has.
        RunFailed: offline, or what the hub says.
    """
    repo_id, _, revision = name.partition("@")
    found = Path()
    for file in (ARCHITECTURE, weights_file(MODEL), CONFIG):
        try:
            got = huggingface_hub.hf_hub_download(repo_id, file, revision=revision or None)
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the hub was not asked, or not reached
                raise RunFailed(
                    f"{HUB}{name}: {file} is not on this machine, and the hub can't be reached. "
                    "Without a network, give a folder that was fetched before."
                ) from None
            if file == CONFIG:  # the run's settings, which a model of another maker has not
                continue
            raise InputError(
                f"{HUB}{name} holds no {file}: it is no model that timm saved."
            ) from error
        except HFValidationError as error:
            raise InputError(f"{HUB}{name}: {error} Give {HUB}OWNER/NAME.") from error
        except Exception as error:  # of several libraries: the network's, the hub's
            said = without_tokens(" ".join(str(error).split()), huggingface_hub.get_token())
            raise RunFailed(
                f"{HUB}{name} can't be had: {printable(said[:300]) or type(error).__name__}. "
                "Without a network, give a folder that was fetched before."
            ) from None
        found = Path(got).parent
    return found


def read_export(folder: Path) -> ExportedModel:
    """The model in a folder with timm's `config.json` and `model.safetensors`.

    Raises:
        InputError: a file that is missing or damaged, or weights that do not fit.
    """
    path, file = folder / ARCHITECTURE, folder / weights_file(MODEL)
    try:
        config = json_in(path)
    except Malformed as error:
        raise InputError(f"{path} is no JSON ({error}). Export the run again.") from error
    if not isinstance(config, Mapping) or not isinstance(config.get("architecture"), str):
        raise InputError(f"{path} names no architecture: timm did not write it.")
    if not file.is_file():
        raise InputError(f"{file} is missing: an export holds it. Export the run again.")
    weights = read_tensors(file)
    pre = _preprocessing(path, config)
    check_preprocessing(path, pre, weights)
    names = config.get("label_names")
    if names is not None:
        check_kinds(path, {"label_names": names}, {"label_names": NAMES})
        if len(names) > pre["num_classes"]:
            raise InputError(
                f"{path} has {len(names)} label_names for {pre['num_classes']} outputs: the file "
                "was edited. Export the run again."
            )
    model = _build(config, pre, weights)
    settings = from_file(folder / CONFIG, of_a_run=True) if (folder / CONFIG).is_file() else None
    return ExportedModel(model, list(names or _usual_names(model)), pre, settings)


def _preprocessing(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """In the terms of a checkpoint's `preprocessing.json`; kinds are checked by the caller."""
    own = config.get("pretrained_cfg")
    if not isinstance(own, Mapping):
        raise InputError(f"{path} has no pretrained_cfg: timm did not write it.")
    size = own.get("input_size")
    if not isinstance(size, list) or len(size) != 3:
        raise InputError(
            f"{path} gives input_size={brief(size)}, and timm writes channels, height and width "
            "there."
        )
    name = config["architecture"]
    small = _SMALL_STEM.fullmatch(name)
    return {
        "model": small[1] if small else name,
        "num_classes": config.get("num_classes", own.get("num_classes")),
        "num_channels": size[0],
        "img_size": size[1],
        "stem": "small" if small else "native",
        **{key: own.get(key) for key in ("interpolation", "crop_pct", "mean", "std")},
    }


def _build(
    config: Mapping[str, Any], pre: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> nn.Module:
    arguments = config.get("model_args") or {}
    if not isinstance(arguments, Mapping):
        raise InputError(
            f"{ARCHITECTURE} gives model_args={brief(arguments)}, which is no mapping."
        )
    name = pre["model"].split(".")[0]
    sizes = {
        "num_classes": pre["num_classes"],
        "num_channels": pre["num_channels"],
        "img_size": pre["img_size"],
    }
    others = {str(k): v for k, v in arguments.items() if k not in _NOT_OF_THE_NETWORK}
    options = {**others, **model_options(name, **sizes)}

    def built() -> nn.Module:
        model = timm.create_model(name, **options)
        if pre["stem"] == "small":
            adapt_stem(model)
        return model

    try:
        with torch.device("meta"):  # without memory: its size is foreign text until it is compared
            described = built()
        check_described(described, weights, ARCHITECTURE)
        model = built()
    except InputError:
        raise
    except Exception as error:  # of timm's models, by arguments that they were not made for
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split())[:200])
        raise InputError(f"{name} can't be built with {brief(others)}: {reason}.") from error
    model.to(dtype_of(weights))
    load_exactly(model, weights, name, None)
    return model.eval()


def _usual_names(model: nn.Module) -> list[str]:
    """ImageNet's, by the number of outputs, as timm infers them; none for other numbers."""
    subset = infer_imagenet_subset(model)
    if subset is None:
        return []
    info = ImageNetInfo(subset)
    names = [text.split(",")[0] for text in info.label_descriptions()]
    often = Counter(names)
    return [
        name if often[name] == 1 else f"{name} ({label})"
        for name, label in zip(names, info.label_names(), strict=True)
    ]


def imagenet_ids(model: nn.Module, names: list[str]) -> list[str] | None:
    """ImageNet's identifiers of the outputs, such as n01440764, where `names` are its words."""
    subset = infer_imagenet_subset(model)
    if subset is None or names != _usual_names(model):
        return None
    return ImageNetInfo(subset).label_names()
