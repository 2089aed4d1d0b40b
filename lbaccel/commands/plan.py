"""`lbaccel plan`: the answer as text or JSON."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbaccel.batch.duration import IMAGENET
from lbaccel.errors import InputError
from lbaccel.network_arguments import network_arguments
from lbaccel.recipe import bounds
from lbaccel.runs.figures import check_plot
from lbaccel.runs.waiting import Waiting
from lbaccel.text import printable

if TYPE_CHECKING:  # flags and help need no torch
    from torch import nn

    from lbaccel.planning.plan import Plan


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The contract, what pins a part of the plan, and the output."""
    add_plan_arguments(parser)
    shown = parser.add_argument_group("output")
    shown.add_argument("--json", action="store_true", help="one JSON object, GiB and seconds")
    shown.add_argument("--sweep", action="store_true", help="the frontier of time against memory")
    shown.add_argument("--plot", type=Path, metavar="F", help="draw the sweep (.png, .svg, .pdf)")
    shown.add_argument(
        "--report", type=Path, metavar="F", help="run two updates here; plan and measurement (JSON)"
    )


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a plan: contract, machine and options."""
    contract = parser.add_argument_group("the contract")
    contract.add_argument("--model", required=True, help="any timm model")
    contract.add_argument(
        "--img-size", type=bounds.pixels, metavar="S", help="default: the model's"
    )
    contract.add_argument("--global-batch-size", type=bounds.count, required=True, metavar="B")
    contract.add_argument(
        "--norm-batch-size",
        type=bounds.norm_samples,
        metavar="N",
        help="or 'global' (the whole batch), 'frozen'",
    )
    contract.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    contract.add_argument("--optimizer", default="sgd", help="any name of timm.optim")
    contract.add_argument("--num-classes", type=bounds.classes, default=1000, metavar="C")
    add_model_kwargs(contract)
    contract.add_argument("--num-samples", type=bounds.count, default=IMAGENET, help="for hours")
    contract.add_argument("--epochs", type=bounds.epochs, default=90.0, help="for hours")
    contract.add_argument(
        "--teacher",
        metavar="PATH",
        help="as for lbaccel train: its weights and its forward are counted",
    )
    device = parser.add_argument_group("the device")
    device.add_argument("--memory", metavar="SIZE", help="such as 8GiB; default: the device's")
    device.add_argument("--device", metavar="NAME", help="such as 'RTX 4090' or cpu")
    device.add_argument("--world-size", type=bounds.ranks, default=1, metavar="W")
    device.add_argument(
        "--zero",
        type=bounds.zero_stage,
        metavar="0|1|2|3",
        help="plan for DeepSpeed's stage; default: none",
    )
    device.add_argument(
        "--offload", choices=("none", "optimizer", "optimizer+parameters"), default="none"
    )
    pins = parser.add_argument_group("pins: what is not to be chosen")
    pins.add_argument(
        "--micro-batch-size", type=bounds.samples_or_auto, default="auto", metavar="N"
    )
    pins.add_argument(
        "--activation-checkpointing", choices=("auto", "none", "full"), default="auto"
    )
    pins.add_argument(
        "--activation-offload",
        choices=("none", "auto"),
        default="none",
        help="auto: activations may lie in the host's memory where that is the fastest way to fit",
    )
    pins.add_argument(
        "--host-memory",
        metavar="SIZE",
        help="of the host, for the activations of each device, or for the passes of "
        "--norm-batch-size global; default: a share of what is free",
    )
    pins.add_argument(
        "--memory-format", choices=("auto", "contiguous", "channels_last"), default="auto"
    )


def add_model_kwargs(parser: Any) -> None:
    """The network's own arguments, as `lbaccel train` takes them."""
    parser.add_argument(
        "--model-kwargs",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="arguments of the network itself, as timm has them: stem=8 'widths=(8,16,32)'",
    )


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; 0 where it fits, 1 where it does not.

    Raises:
        InputError: see `plan`.
    """
    a = arguments
    if a.plot is not None and not a.sweep:
        raise InputError("--plot draws a sweep. Add --sweep, or leave it out.")
    check_plot(a.plot, parents=True)
    if a.report is not None and a.teacher is not None:
        raise InputError("--report measures a network without a teacher. Leave one of them out.")
    if a.report is not None:
        from lbaccel.planning.report import check_report  # it needs accelerate

        check_report(a.report)

    from lbaccel.planning.sweep import plot
    from lbaccel.planning.text import lines

    found = find_plan(a, sweeps=a.sweep)
    if a.plot is not None:
        title = f"{found.model}, global batch {a.global_batch_size}, {found.device.name}"
        plot(list(found.points), a.plot, title=title, budget_gib=found.budget_gib)
    if a.json:
        print(json.dumps(found.to_dict()))
    else:
        print(printable("\n".join(lines(found))))
    if a.report is not None:
        from lbaccel.planning.report import write_report

        _, line = write_report(
            found,
            a.report,
            num_classes=a.num_classes,
            img_size=a.img_size,
            model_kwargs=network_arguments(a.model_kwargs),
        )
        print(line, file=sys.stderr if a.json else sys.stdout)
    return 0 if found.fits else 1


def find_plan(a: argparse.Namespace, *, sweeps: bool = False) -> Plan:
    """The plan for the arguments of `add_plan_arguments`.

    Raises:
        InputError: see `plan`.
    """

    from lbaccel.planning.planner import plan

    def asked(value: Any) -> Any:
        return None if value == "auto" else value

    with Waiting("plan") as waiting:
        return plan(
            a.model,
            global_batch_size=a.global_batch_size,
            img_size=a.img_size,
            memory=a.memory,
            world_size=a.world_size,
            device=a.device,
            precision=a.precision,
            optimizer=a.optimizer,
            teacher=None if a.teacher is None else _teacher(a.teacher, img_size=a.img_size),
            norm_batch_size=a.norm_batch_size,
            num_classes=a.num_classes,
            model_kwargs=network_arguments(a.model_kwargs),
            micro_batch_size=asked(a.micro_batch_size),
            activation_checkpointing=asked(a.activation_checkpointing),
            activation_offload=a.activation_offload,
            memory_format=asked(a.memory_format),
            zero_stage=a.zero,
            offload=a.offload,
            host_memory=a.host_memory,
            num_samples=a.num_samples,
            epochs=a.epochs,
            sweeps=sweeps,
            say=waiting.say,
        )


def _teacher(path: str, *, img_size: int | None) -> nn.Module:
    from lbaccel.recipe.trained_model import read_trained

    trained = read_trained(path)
    size = trained.preprocessing["img_size"]
    if img_size not in (None, size):
        raise InputError(
            f"--teacher {path} takes images of {size} px, and --img-size is {img_size}: it sees "
            f"those of the network. Use --img-size {size}."
        )
    return trained.model.float()
