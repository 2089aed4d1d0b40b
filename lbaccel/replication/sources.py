"""The source of a recipe, whatever it is: which reader takes it; and its BatchNorm layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.documents import Malformed, json_of, text_of, yaml_of
from lbaccel.errors import CannotRead, InputError
from lbaccel.replication.contract import Norms
from lbaccel.replication.many_gpus import Recipe
from lbaccel.replication.readers.accelerate_config import (
    deepspeed_file,
    is_accelerate_config,
    is_deepspeed_config,
    read_accelerate,
)
from lbaccel.replication.readers.plain import Said, read_plain
from lbaccel.replication.readers.timm_args import is_timm_args, read_timm_args
from lbaccel.replication.readers.torchvision_flags import read_torchvision_flags, split_command

SOURCES = (
    "timm's args.yaml, an accelerate YAML or its DeepSpeed JSON, or a text file with torchvision's "
    "command line; or that command itself after --"
)


def read_source(
    words: Sequence[str], said: Said, *, gpus: int | None, num_samples: int | None
) -> Recipe:
    """The recipe that the words of a command line point at: a file, a command, or `said` alone.

    Args:
        words: a path, or a command's words.
        said: what was said beside; a source that says it too is refused.
        gpus: of the recipe, all nodes; None where the source says it.
        num_samples: of the training set, for a scheduler that counts updates; None: ImageNet's.

    Raises:
        InputError: no source, several, or one of no known kind.
    """
    if not words:
        return read_plain(said, gpus=gpus)
    if len(words) == 1 and not words[0].startswith("-"):
        try:
            return _read_file(Path(words[0]), said, gpus=gpus, num_samples=num_samples)
        except InputError:
            raise
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise InputError(
                f"{words[0]} holds a value of another type than its script writes: {error}. "
                "Correct it."
            ) from error
    if Path(words[0]).suffix in (".yaml", ".yml", ".json", ".txt"):
        raise InputError(
            f"two sources: {words[0]} and {' '.join(words[1:])[:60]}. Give one, and leave out --."
        )
    said.refuse("the command", allowed=("model",))
    return read_torchvision_flags(
        words, gpus=gpus, model=said.model, origin="torchvision's command"
    )


def _read_file(path: Path, said: Said, *, gpus: int | None, num_samples: int | None) -> Recipe:
    text = _text(path)
    content = _mapping(text, path)
    if content is None:
        words = split_command(text)
        if not any(word.startswith("-") for word in words):
            raise InputError(f"{path} is of no known kind. Give {SOURCES}.")
        said.refuse(path.name, allowed=("model",))
        return read_torchvision_flags(words, gpus=gpus, model=said.model, origin=path.name)
    if is_timm_args(content):
        said.refuse(path.name)
        return read_timm_args(content, gpus=gpus, origin=path.name)
    numbers = {"said": said, "gpus": gpus, "num_samples": num_samples}
    if is_accelerate_config(content):
        name, origin = deepspeed_file(content), path.name
        deepspeed = None
        if name is not None:  # accelerate looks for it from the current folder
            near = next((p for p in (Path(name), path.parent / name) if p.is_file()), Path(name))
            deepspeed, origin = _mapping(_text(near), near), f"{origin} with {near.name}"
            if deepspeed is None:
                raise InputError(f"{near} holds no JSON object. Correct it.")
        return read_accelerate(content, deepspeed, origin=origin, **numbers)
    if is_deepspeed_config(content):
        return read_accelerate({}, content, origin=path.name, **numbers)
    raise InputError(
        f"{path} is of no known kind: its keys are {', '.join(map(str, list(content)[:6]))}. Give "
        f"{SOURCES}."
    )


def _text(path: Path) -> str:
    try:
        return text_of(path)
    except CannotRead as error:
        raise InputError(f"{error} Give {SOURCES}.") from error
    except Malformed as error:
        raise InputError(f"{path} is no text. Give {SOURCES}.") from error


def _mapping(text: str, path: Path) -> Mapping[str, Any] | None:
    """The mapping in a YAML or JSON file; None for other text."""
    if path.suffix not in (".yaml", ".yml", ".json"):
        return None
    try:
        content = (json_of if path.suffix == ".json" else yaml_of)(text, path)
    except Malformed as error:
        raise InputError(f"{path} is no {path.suffix[1:].upper()}: {error}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no mapping. Give {SOURCES}.")
    return content


def _arguments(recipe: Recipe) -> Mapping[str, Any] | None:
    return next((row.value for row in recipe.rows if row.setting == "model_kwargs"), None)


def norms_of(model: str, recipe: Recipe) -> Norms:
    """The BatchNorm layers of a network of timm's, built without memory.

    Raises:
        InputError: timm has no such network.
    """
    import torch  # to read a source needs none
    from torch.nn.modules.batchnorm import _BatchNorm

    from lbaccel.models import create_backbone

    try:
        with torch.device("meta"):
            network = create_backbone(model, num_classes=1000, arguments=_arguments(recipe))
    except InputError as error:
        raise InputError(
            f"{recipe.said_model} in {recipe.origin}: {error} Give the nearest with --model NAME, "
            "or correct the source."
        ) from error
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    return Norms(len(layers), tuple(layer.momentum for layer in layers))
