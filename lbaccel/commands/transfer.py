"""`lbaccel transfer`: the sheet as a diff, JSON, or a file for `lbaccel train --config`."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lbaccel.errors import InputError
from lbaccel.hyperparameters.optimizers import DECAYS
from lbaccel.hyperparameters.rows import Row, Sheet, shown
from lbaccel.hyperparameters.transfer import transfer
from lbaccel.optim.scaling import PER_SAMPLES, RULES, is_measured, rule_named
from lbaccel.recipe import bounds
from lbaccel.recipe.options import Settings
from lbaccel.recipe.rate import check_scaling, rate_of
from lbaccel.recipe.settings import layered, read_yaml, under_a_batch_schedule
from lbaccel.runs.outputs import writable
from lbaccel.text import printable

WIDTH = 100
OF_A_RUN = ("resume", "extend", "dry_run", "output", "max_hours", "max_updates")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The values at the base batch, and the output."""
    parser.description = "Move every hyper-parameter from one global batch to another."
    old = parser.add_argument_group("the batches")
    old.add_argument(
        "--base-batch-size", type=bounds.count, metavar="B0", help="of the values given here"
    )
    old.add_argument(
        "--global-batch-size", type=bounds.count, required=True, metavar="B", help="the new"
    )
    old.add_argument("--config", type=Path, metavar="YAML", help="values of a recipe; flags win")
    values = parser.add_argument_group("values at the base batch; what is not given is left out")
    values.add_argument("--optimizer", metavar="NAME", help="of timm.optim (default: sgd)")
    values.add_argument(
        "--base-lr", type=bounds.positive, metavar="X", help="default: 0.1 (SGD) or 0.001"
    )
    values.add_argument(
        "--lr-scaling", choices=("auto", *RULES, *PER_SAMPLES), help="rule (default: auto)"
    )
    values.add_argument(
        "--lr-exponent", type=bounds.not_negative, metavar="P", help="of the rule power"
    )
    values.add_argument("--momentum", type=bounds.below_one, metavar="X", help="default: 0.9 (SGD)")
    values.add_argument(
        "--weight-decay", type=bounds.not_negative, metavar="X", help="default: 1e-4 or 0.05"
    )
    values.add_argument("--decay", choices=DECAYS, help="how weight decay enters (default: auto)")
    for name in ("ema-decay", "beta1", "beta2"):
        values.add_argument(f"--{name}", type=bounds.below_one, metavar="X")
    for name in ("clip-grad-norm", "eps"):
        values.add_argument(f"--{name}", type=bounds.positive, metavar="X")
    values.add_argument(
        "--warmup-epochs",
        type=bounds.epochs_from_zero,
        metavar="X",
        help="default: 5, or epochs / 4",
    )
    values.add_argument("--epochs", type=bounds.epochs, metavar="X")
    values.add_argument("--num-samples", type=bounds.count, metavar="N", help="of one epoch")
    values.add_argument("--eval-every", type=bounds.positive, metavar="X", help="epochs")
    values.add_argument("--log-every", type=bounds.count, metavar="N", help="updates")
    values.add_argument("--checkpoint-every", type=bounds.count, metavar="N", help="updates")
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON object")
    output.add_argument("--out", type=Path, metavar="F", help="write F.yaml for lbaccel train")


def run(arguments: argparse.Namespace) -> int:
    """Print the sheet, and write it where asked.

    Raises:
        InputError: see `transfer`; a file that can't be read or written.
    """
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    config, out, as_json = given.pop("config", None), given.pop("out", None), given.pop("json")
    if out is not None:
        writable(_not_there(out), "--out")
    layer: dict[str, Any] = {}
    if config is not None:
        layer = {k: v for k, v in read_yaml(config).items() if k not in OF_A_RUN}
        given = {**_values_of(layer, config, given), **given}
    elif "base_batch_size" not in given:
        raise InputError("--base-batch-size is missing: the batch that the values belong to.")
    if "optimizer" in given:
        from lbaccel.optim.optimizers import check_known  # it asks timm

        check_known(given["optimizer"])
    sheet = transfer(**given)
    if layer.get("batch_schedule") is not None:
        note = (
            f"batch schedule {layer['batch_schedule']}: its first batch and rate are moved; "
            "milestones, factors and max_batch_size stay as they are."
        )
        sheet = replace(sheet, warnings=(*sheet.warnings, note))
    if out is not None:
        write(sheet, out, layer)
    if as_json:
        print(json.dumps(sheet.to_dict(), allow_nan=False))
    else:
        print(printable("\n".join(lines(sheet))))
        if out is not None:
            print(f"\n{out}: lbaccel train --config {out}")
    return 0


def _values_of(layer: Mapping[str, Any], path: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that `transfer` takes, at the batch of a recipe's file and with its peak rate."""
    from lbaccel.recipe.checks import check_read

    s = under_a_batch_schedule(layered(Settings(), layer, origin=str(path)))
    check_read(s)
    batch, rule = s.batch.global_batch_size, s.rate.lr_scaling
    measured = f"--lr-scaling {rule}" if is_measured(rule) else None
    if batch == "auto" or measured is not None:
        raise InputError(
            f"{path} has {'--global-batch-size auto' if batch == 'auto' else measured}: what a run "
            "measures sets its learning rate, so there is no rate to move. Give a recipe with one "
            "batch and a rule, or the values as flags."
        )
    asked = given.get("base_batch_size", batch)
    if asked != batch and "base_lr" not in given:
        raise InputError(
            f"--base-batch-size {asked}: {path} is a recipe for {batch}. Leave the flag out, or "
            f"give --base-lr at {asked} too."
        )
    check_scaling(s.rate, s.batch, noise_scale=s.run.noise_scale)
    rate = rate_of(s, global_batch_size=batch)
    values = {
        "optimizer": s.optimizer.optimizer,
        "ema_decay": s.optimizer.ema_decay,
        "clip_grad_norm": s.optimizer.clip_grad_norm,
        "eps": s.optimizer.eps,
        "epochs": s.rate.epochs,
        "eval_every": s.run.eval_every,
        "log_every": s.run.log_every,
        "checkpoint_every": s.run.checkpoint_every,
    }
    for i, beta in enumerate(s.optimizer.betas or ()):
        values[f"beta{i + 1}"] = beta
    if "momentum" in layer:
        values["momentum"] = s.optimizer.momentum
    row = rule_named(rate.rule)
    if row.samples is not None:
        values["lr_scaling"] = row.plain
    elif "base_batch_size" in row.reads:  # else the rate is absolute: no rule to go on with
        values |= {"lr_scaling": rate.rule, "lr_exponent": rate.exponent}
    if "lr_scaling" in given:
        values.pop("lr_exponent", None)
    values |= {"base_batch_size": batch, "base_lr": rate.lr, "weight_decay": rate.weight_decay}
    return {**values, "warmup_epochs": rate.warmup_epochs}


def lines(sheet: Sheet) -> list[str]:
    """The sheet as a diff: item, old, new, and beneath them rule, source and how sure."""
    found = [
        f"--- at {sheet.base_batch_size} samples an update",
        f"+++ at {sheet.global_batch_size} samples an update (k = {sheet.k:.6g})",
    ]
    for row in sheet.rows:
        found += ["", row.item, *_values(row)]
        found += textwrap.wrap(row.rule, WIDTH - 4, initial_indent="    ", subsequent_indent="    ")
        source = "" if row.source == "none" else f"[{row.source}] "
        text = f"{source}{row.sure}"
        found += textwrap.wrap(text, WIDTH - 4, initial_indent="    ", subsequent_indent="    ")
    for warning in sheet.warnings:
        found += ["", *textwrap.wrap(f"warning: {warning}", WIDTH, subsequent_indent="  ")]
    return found


def _values(row: Row) -> list[str]:
    if row.old == row.new:
        return [f"  {shown(row.old)}"]
    return [f"- {shown(row.old)}", f"+ {shown(row.new)}"]


def write(sheet: Sheet, path: Path, layer: Mapping[str, Any]) -> None:
    """The recipe's file: the settings of `layer`, those of the sheet on top.

    Raises:
        InputError: the file is there by now.
    """
    settings = {**{k: v for k, v in layer.items() if k != "lr_exponent"}, **sheet.settings}
    settings = {key: _plain(value) for key, value in settings.items()}
    head = (
        f"# lbaccel transfer: from {sheet.base_batch_size} to {sheet.global_batch_size} samples an "
        f"update, learning rate {shown(sheet.lr)}\n"
    )
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(head + yaml.safe_dump(settings, sort_keys=False))
    except FileExistsError:
        _not_there(path)
        raise


def _not_there(path: Path) -> Path:
    if path.exists():
        raise InputError(f"--out {path} exists, and is left as it is. Give another.")
    return path


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
