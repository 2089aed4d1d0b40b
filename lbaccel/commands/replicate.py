"""`lbaccel replicate`: a many-GPU recipe as the contract of one card, and the plan for it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.nn.modules.batchnorm import _BatchNorm

from lbaccel.errors import InputError
from lbaccel.models import create_backbone
from lbaccel.optim.scaling import scale_lr
from lbaccel.planning.planner import IMAGENET, plan
from lbaccel.planning.text import lines as plan_lines
from lbaccel.recipe.model import check_numbers
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import parse
from lbaccel.recipe.values import switch
from lbaccel.replication.contract import Contract, Norms, contract_of
from lbaccel.replication.many_gpus import Recipe, Row
from lbaccel.replication.readers.accelerate_config import (
    deepspeed_file,
    is_accelerate_config,
    is_deepspeed_config,
    read_accelerate,
)
from lbaccel.replication.readers.plain import Said, read_plain
from lbaccel.replication.readers.timm_args import is_timm_args, read_timm_args
from lbaccel.replication.readers.torchvision_flags import read_torchvision_flags, split_command
from lbaccel.replication.render import table, to_yaml

SOURCES = (
    "timm's args.yaml, an accelerate YAML or its DeepSpeed JSON, or a text file with torchvision's "
    "command line; or that command itself after --"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The source, what it may not say, and the machine to plan for."""
    parser.usage = "lbaccel replicate [SOURCE] [--gpus N] [...] [-- COMMAND ...]"
    parser.description = (
        "What a recipe made for many GPUs asks for, as the contract of one card: global batch, "
        "norm_batch_size, learning rate, schedule, average; and the plan for this machine."
    )
    parser.add_argument("source", nargs="*", metavar="SOURCE", help=SOURCES)
    parser.add_argument("--gpus", type=int, metavar="N", help="GPUs of the recipe, all nodes")
    said = parser.add_argument_group("what the source does not say")
    said.add_argument("--per-gpu-batch", type=int, metavar="B", help="samples a forward of one GPU")
    said.add_argument("--accumulation", type=int, metavar="K", help="micro-batches an update")
    said.add_argument("--global-batch-size", type=int, metavar="G", help="in place of K")
    said.add_argument("--sync-bn", type=_switch, metavar="yes|no", help="SyncBatchNorm")
    said.add_argument("--model", metavar="NAME", help="timm's name of the network")
    said.add_argument("--optimizer", metavar="NAME", help="timm's name")
    said.add_argument("--lr", type=float, metavar="X", help="absolute, of the global batch")
    said.add_argument("--momentum", type=float, metavar="X", help="of SGD and its kin")
    said.add_argument("--weight-decay", type=float, metavar="X", help="on weights")
    said.add_argument("--epochs", type=float, metavar="E", help="warmup included")
    said.add_argument("--warmup-epochs", type=float, metavar="E", help="of --epochs")
    said.add_argument("--img-size", type=int, metavar="S", help="pixels a side")
    said.add_argument("--data", metavar="D", help="as for lbaccel train; wins over the source's")
    said.add_argument("--num-samples", type=int, metavar="N", help="training set (ImageNet's)")
    out = parser.add_argument_group("output")
    out.add_argument("--out", type=Path, metavar="FILE", help="write the YAML there, not here")
    out.add_argument("--force", action="store_true", help="write over an existing FILE")
    out.add_argument("--no-plan", action="store_true", help="the contract alone")
    out.add_argument("--memory", metavar="SIZE", help="such as 8GiB; default: the device's")
    out.add_argument("--device", metavar="NAME", help="such as 'RTX 4090' or cpu")


def _switch(text: str) -> bool:
    try:
        return switch(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither yes nor no") from error


def run(arguments: argparse.Namespace) -> int:
    """Print the contract and the plan; 0, or 1 where the plan does not fit.

    Raises:
        InputError: a source of no use, or one that is contradicted.
    """
    a = arguments
    recipe = read_source(a)
    norms = None if recipe.model is None else norms_of(recipe.model, recipe)
    contract = contract_of(recipe, norms)
    if a.data is not None:
        rows = tuple(row for row in contract.rows if row.setting != "data")
        row = Row(f"--data {a.data}", "data", a.data, "as typed")
        contract = replace(contract, rows=(*rows, row))
    check_contract(contract)
    print("\n".join(table(contract)))
    text = to_yaml(contract)
    if a.out is None:
        print(f"\n{text}", end="")
    else:
        _write(a.out, text, force=a.force)
        print(f"\nwritten: {a.out}; run it: lbaccel train --config {a.out}")
    if a.no_plan:
        return 0
    return _plan(contract, a)


def read_source(a: argparse.Namespace) -> Recipe:
    """The recipe that the command line points at.

    Raises:
        InputError: no source, several, or one of no known kind.
    """
    names = Said.__dataclass_fields__
    said = Said(**{name: getattr(a, name) for name in names})
    words: Sequence[str] = a.source
    if not words:
        return read_plain(said, gpus=a.gpus)
    if len(words) == 1 and not words[0].startswith("-"):
        try:
            return _read_file(Path(words[0]), said, a)
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
    return read_torchvision_flags(words, gpus=a.gpus, model=a.model, origin="torchvision's command")


def _read_file(path: Path, said: Said, a: argparse.Namespace) -> Recipe:
    text = _text(path)
    content = _mapping(text, path)
    if content is None:
        words = split_command(text)
        if not any(word.startswith("-") for word in words):
            raise InputError(f"{path} is of no known kind. Give {SOURCES}.")
        said.refuse(path.name, allowed=("model",))
        return read_torchvision_flags(words, gpus=a.gpus, model=a.model, origin=path.name)
    if is_timm_args(content):
        said.refuse(path.name)
        return read_timm_args(content, gpus=a.gpus, origin=path.name)
    numbers = {"said": said, "gpus": a.gpus, "num_samples": a.num_samples}
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
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}. Give {SOURCES}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no text. Give {SOURCES}.") from error


def _mapping(text: str, path: Path) -> Mapping[str, Any] | None:
    """The mapping in a YAML or JSON file; None for other text."""
    if path.suffix not in (".yaml", ".yml", ".json"):
        return None
    try:
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is no {path.suffix[1:].upper()}: {problem}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no mapping. Give {SOURCES}.")
    return content


def norms_of(model: str, recipe: Recipe) -> Norms:
    """The BatchNorm layers of a network of timm's, built without memory.

    Raises:
        InputError: timm has no such network.
    """
    try:
        with torch.device("meta"):
            network = create_backbone(model, num_classes=1000)
    except InputError as error:
        raise InputError(
            f"{recipe.said_model} in {recipe.origin}: {error} Give the nearest with --model NAME, "
            "or correct the source."
        ) from error
    layers = [m for m in network.modules() if isinstance(m, _BatchNorm)]
    return Norms(len(layers), tuple(layer.momentum for layer in layers))


def check_contract(contract: Contract) -> None:
    """Stop at a value that `lbaccel train` would refuse.

    Raises:
        InputError: such a value, under its name in the contract.
    """
    values = {name: option.default for name, option in OPTIONS.items()}
    for name, value in contract.settings.items():
        values[name] = parse(OPTIONS[name], value, "the contract")
    # fp16 needs a GPU where the contract is run, not where it is written
    check_numbers(values | {"precision": None})


def _write(path: Path, text: str, *, force: bool) -> None:
    if path.exists() and not force:
        raise InputError(f"--out {path} exists. Give another name, or --force to write over it.")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"--out {path} can't be written: {error.strerror}.") from error


def _plan(contract: Contract, a: argparse.Namespace) -> int:
    s = contract.settings
    print()
    if "model" not in s:
        print("plan: none, since no network is named; add --model NAME")
        return 0
    found = plan(
        s["model"],
        global_batch_size=s["global_batch_size"],
        norm_batch_size=s.get("norm_batch_size"),
        img_size=s.get("img_size"),
        num_classes=s.get("num_classes", 1000),
        optimizer=s.get("optimizer", "sgd"),
        precision=s.get("precision", "fp32"),
        mix_pairs=bool(s.get("mixup") or s.get("cutmix")),
        clip_grad_norm=s.get("clip_grad_norm") is not None,
        num_samples=a.num_samples or IMAGENET,
        epochs=s.get("epochs", OPTIONS["epochs"].default),
        memory=a.memory,
        device=a.device,
    )
    if "base_lr" in s:  # the planner shows the rate of lbaccel's defaults
        sizes = {name: s[name] for name in ("base_batch_size", "global_batch_size")}
        found = replace(found, lr=scale_lr(s["base_lr"], rule=s["lr_scaling"], **sizes))
    print("\n".join(plan_lines(found)))
    return 0 if found.fits else 1
