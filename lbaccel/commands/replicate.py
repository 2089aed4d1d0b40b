"""`lbaccel replicate`: a many-GPU recipe as the contract of one card, and the plan for it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lbaccel.batch.duration import IMAGENET
from lbaccel.errors import InputError
from lbaccel.launch import calibration_file
from lbaccel.optim.scaling import scale_lr
from lbaccel.recipe import bounds
from lbaccel.recipe.options import Settings
from lbaccel.recipe.settings import layered, read_yaml
from lbaccel.recipe.values import switch
from lbaccel.replication.contract import Contract, contract_of
from lbaccel.replication.many_gpus import Translation
from lbaccel.replication.readers.plain import Said
from lbaccel.replication.render import table, to_yaml
from lbaccel.replication.sources import SOURCES, norms_of, read_source
from lbaccel.runs.folder import atomic_write_text
from lbaccel.runs.outputs import Own, writable
from lbaccel.text import printable

if TYPE_CHECKING:  # flags and help need no torch
    from torch import nn


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The source, what it may not say, and the machine to plan for."""
    parser.usage = "lbaccel replicate [SOURCE] [--gpus N] [...] [-- COMMAND ...]"
    parser.description = (
        "A recipe made for many GPUs, as the contract of one card: global batch, "
        "norm_batch_size, learning rate, schedule, average; and the plan for this machine."
    )
    parser.add_argument("source", nargs="*", metavar="SOURCE", help=SOURCES)
    parser.add_argument(
        "--gpus", type=bounds.ranks, metavar="N", help="GPUs of the recipe, all nodes"
    )
    said = parser.add_argument_group("what the source does not say")
    said.add_argument(
        "--per-gpu-batch", type=bounds.count, metavar="B", help="samples a forward of one GPU"
    )
    said.add_argument(
        "--accumulation", type=bounds.count, metavar="K", help="micro-batches an update"
    )
    said.add_argument("--global-batch-size", type=bounds.count, metavar="G", help="in place of K")
    said.add_argument("--sync-bn", type=_switch, metavar="yes|no", help="SyncBatchNorm")
    said.add_argument("--model", metavar="NAME", help="timm's name of the network")
    said.add_argument("--optimizer", metavar="NAME", help="timm's name")
    said.add_argument(
        "--lr", type=bounds.positive, metavar="X", help="absolute, of the global batch"
    )
    said.add_argument("--momentum", type=bounds.below_one, metavar="X", help="of SGD and its kin")
    said.add_argument("--weight-decay", type=bounds.not_negative, metavar="X", help="on weights")
    said.add_argument("--epochs", type=bounds.epochs, metavar="E", help="warmup included")
    said.add_argument(
        "--warmup-epochs", type=bounds.epochs_from_zero, metavar="E", help="of --epochs"
    )
    said.add_argument("--img-size", type=bounds.pixels, metavar="S", help="pixels a side")
    said.add_argument("--data", metavar="D", help="as for lbaccel train; wins over the source's")
    said.add_argument(
        "--num-samples", type=bounds.count, metavar="N", help="training set (ImageNet's)"
    )
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
    if not a.no_plan:
        _check_machine(a)
    said = Said(**{name: getattr(a, name) for name in Said.__dataclass_fields__})
    if a.out is not None:
        _check_out(a.out, force=a.force)
    recipe = read_source(a.source, said, gpus=a.gpus, num_samples=a.num_samples)
    norms = None if recipe.model is None else norms_of(recipe.model, recipe)
    contract = contract_of(recipe, norms)
    if a.data is not None:
        rows = tuple(row for row in contract.rows if row.setting != "data")
        row = Translation(f"--data {a.data}", "data", a.data, "as typed")
        contract = replace(contract, rows=(*rows, row))
    check_contract(contract)
    print(printable("\n".join(table(contract))))
    text = to_yaml(contract)
    if a.out is None:
        print(printable(f"\n{text}"), end="")
    else:
        atomic_write_text(a.out, text)
        print(f"\nwritten: {a.out}; run it: lbaccel train --config {a.out}")
    if a.no_plan:
        return 0
    return _plan(contract, a)


def _check_machine(a: argparse.Namespace) -> None:
    """The same that the plan would refuse, before a file is written."""
    from lbaccel.planning.cost.devices import find_device
    from lbaccel.update.memory.budget import parse_memory

    if a.memory is not None:
        parse_memory(a.memory)
    if a.device is not None:
        find_device(a.device, calibration_file())


def check_contract(contract: Contract) -> None:
    """Stop at a value that `lbaccel train` would refuse.

    Raises:
        InputError: such a value, under its name in the contract.
    """
    from lbaccel.optim.optimizers import check_known
    from lbaccel.recipe.checks import checked

    settings = layered(Settings(), contract.settings, origin="the contract")
    check_known(settings.optimizer.optimizer)
    # a GPU for fp16, and the images, are there where the contract is run, not where it is written
    there = {"precision": None} | ({} if "data" in contract.settings else {"data": "folder:PATH"})
    checked(settings.with_values(there))


def _check_out(path: Path, *, force: bool) -> None:
    if path.exists() and not force:
        raise InputError(f"--out {path} exists. Give another name, or --force to write over it.")
    writable(path, "--out", own=RECIPE)


def _is_recipe(path: Path) -> bool:
    read_yaml(path)  # an InputError, where a name is no setting
    return True


RECIPE = Own("recipe of lbaccel train", _is_recipe)


def _teacher(s: Settings) -> nn.Module | None:
    """The network of timm's teacher, without its weights, which a plan does not need."""
    if s.data.teacher is None:
        return None
    import torch

    from lbaccel.models import create_backbone

    with torch.device("meta"):
        return create_backbone(
            s.data.teacher.rpartition("/")[2],
            num_classes=s.model.num_classes or 1000,
            img_size=s.data.img_size,
        )


def _plan(contract: Contract, a: argparse.Namespace) -> int:
    print()
    if "model" not in contract.settings:
        print("plan: none, since no network is named; add --model NAME")
        return 0
    from lbaccel.planning.planner import plan
    from lbaccel.planning.text import lines as plan_lines

    s = layered(Settings(), contract.settings, origin="the contract")
    found = plan(
        s.model.model,
        global_batch_size=s.batch.first_size,
        norm_batch_size=s.batch.norm_batch_size,
        img_size=s.data.img_size,
        num_classes=s.model.num_classes or 1000,
        model_kwargs=s.model.model_kwargs,
        optimizer=s.optimizer.optimizer,
        precision=cast(Any, s.batch.precision or "fp32"),
        teacher=_teacher(s),
        mix_pairs=bool(s.data.mixup or s.data.cutmix),
        clip_grad_norm=s.optimizer.clip_grad_norm is not None,
        num_samples=a.num_samples or IMAGENET,
        epochs=s.rate.epochs,
        memory=a.memory,
        device=a.device,
    )
    if s.rate.base_lr is not None:  # the planner shows the rate of lbaccel's defaults
        lr = scale_lr(
            s.rate.base_lr,
            base_batch_size=s.rate.base_batch_size,
            global_batch_size=s.batch.first_size,
            rule=s.rate.lr_scaling,
        )
        found = replace(found, lr=lr)
    print(printable("\n".join(plan_lines(found))))
    return 0 if found.fits else 1
