"""`lbaccel configs ls|cp|validate|make`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lbaccel.batch.plan import BatchPlan
from lbaccel.commands.plan import add_plan_arguments
from lbaccel.configs.shipped import copy, find, launch_lines, shipped, write
from lbaccel.errors import InputError
from lbaccel.launch import variables
from lbaccel.recipe import bounds
from lbaccel.recipe.presets import listed, recipes
from lbaccel.runs.columns import columns
from lbaccel.text import printable

if TYPE_CHECKING:  # `configs ls` and `cp` need no torch
    from lbaccel.configs.launcher import Launch, ResolvedValue

MICRO_BATCH_SIZE, GLOBAL_BATCH_SIZE = 32, 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Four actions."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ls|cp|validate|make")
    actions.add_parser("ls", help="each config and recipe, and when to use it", allow_abbrev=False)

    copying = actions.add_parser("cp", help="copy YAML and JSON", allow_abbrev=False)
    copying.add_argument("names", nargs="+", metavar="NAME", help="see ls")
    _add_target(copying)

    checking = actions.add_parser(
        "validate", help="every key, its value, and who decides it", allow_abbrev=False
    )
    checking.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="a YAML, a JSON, both"
    )
    checking.add_argument(
        "--global-batch-size", type=bounds.count, default=GLOBAL_BATCH_SIZE, metavar="B"
    )
    checking.add_argument(
        "--micro-batch-size", type=bounds.count, default=MICRO_BATCH_SIZE, metavar="N"
    )
    checking.add_argument(
        "--world-size", type=bounds.ranks, metavar="W", help="default: the YAML's, else 1"
    )
    checking.add_argument(
        "--launch", default="", metavar="FLAGS", help="more flags of accelerate launch, in quotes"
    )
    script = checking.add_argument_group("what your script says")
    script.add_argument(
        "--accelerator-steps",
        type=bounds.count,
        metavar="K",
        help="its gradient_accumulation_steps; default: the plan's",
    )
    script.add_argument(
        "--precision", choices=("fp32", "bf16", "fp16"), help="default: it says none"
    )

    making = actions.add_parser("make", help="the pair of files for a plan", allow_abbrev=False)
    add_plan_arguments(making)
    making.description = "Without --zero: what --offload needs, else 1, on one device 0."
    _add_target(making)


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--to", type=Path, default=Path(), metavar="DIR", help="default: here")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def run(arguments: argparse.Namespace) -> int:
    """0 done; 1 where a plan does not fit; 2 where a config is refused.

    Raises:
        InputError: unknown names, files that are there already, files that can't be read.
    """
    return {"ls": _list, "cp": _copy, "validate": _validate, "make": _make}[arguments.action](
        arguments
    )


def _list(_: argparse.Namespace) -> int:
    print("\n".join(columns([(config.name, config.use) for config in shipped()])))
    print(listed(), end="")
    return 0


def _copy(a: argparse.Namespace) -> int:
    known, names = recipes(), dict.fromkeys(a.names)
    configs = [find(name) for name in names if name not in known]
    chosen = [known[name] for name in names if name in known]
    for path in copy(configs, a.to, recipes=chosen, force=a.force):
        print(printable(str(path)))
    lines = [f"lbaccel train --config {shlex.quote(str(a.to / path.name))}" for path in chosen]
    print(printable("\n".join([*launch_lines(configs, a.to), *lines])))
    return 0


def _validate(a: argparse.Namespace) -> int:
    from lbaccel.configs.against_plan import (
        batch_notes,
        differences,
        fsdp_problems,
        precision_notes,
    )
    from lbaccel.configs.claims import ScriptArguments
    from lbaccel.configs.launcher import launch
    from lbaccel.configs.resolve import read_json, resolve

    yaml_file, json_file = _files(a.files)
    flags = shlex.split(a.launch)
    if yaml_file is not None and a.world_size is not None:
        flags += ["--num_processes", str(a.world_size)]
    environment = variables("ACCELERATE_", "FSDP_", "DS_")
    started: Launch | None = None
    if yaml_file is not None:
        started = launch(yaml_file, flags=flags, environment=environment)
        json_file = _named(started, yaml_file, json_file)
    elif flags:
        raise InputError("--launch are flags for a YAML, and there is none. Give the YAML too.")
    world_size = started.world_size if started else a.world_size or 1
    plan = BatchPlan(
        global_batch_size=a.global_batch_size,
        micro_batch_size=a.micro_batch_size,
        world_size=world_size,
    )
    rows = list(started.rows) if started else []
    problems = list(started.problems) if started else []
    notes: list[str] = []
    if json_file is not None or (started and started.distributed_type == "DEEPSPEED"):
        script = ScriptArguments(
            micro_batch_size=plan.micro_batch_size,
            gradient_accumulation_steps=plan.gradient_accumulation_steps
            if a.accelerator_steps is None
            else a.accelerator_steps,
            mixed_precision={"fp32": "no"}.get(a.precision, a.precision),
        )
        resolved = resolve(
            None if json_file is None else read_json(json_file),
            script,
            world_size=world_size,
            launch=started,
            environment=environment,
        )
        rows += resolved.rows
        problems += resolved.problems
        if not resolved.problems:
            problems += differences(plan, resolved.batch)
            notes = [*batch_notes(plan, resolved.batch), *precision_notes(resolved)]
    elif started is not None:
        problems += fsdp_problems(started)
    print(printable("\n".join(_table(rows))))
    print(printable(f"\n{plan}"))
    for note in notes:
        print(printable(f"note: {note}"))
    for problem in problems:
        print(printable(f"error: {problem}"), file=sys.stderr)
    return 2 if problems else 0


def _files(files: list[Path]) -> tuple[Path | None, Path | None]:
    """The YAML and the JSON among the files."""
    found: dict[str, Path] = {}
    for path in files:
        kind = {".yml": ".yaml"}.get(path.suffix.lower(), path.suffix.lower())
        if kind not in (".yaml", ".json"):
            raise InputError(f"{path} is neither .yaml nor .json. Give the launcher's files.")
        if kind in found:
            raise InputError(f"{found[kind]} and {path} are both {kind}. Give one at a time.")
        found[kind] = path
    return found.get(".yaml"), found.get(".json")


def _named(started: Launch, yaml_file: Path, given: Path | None) -> Path | None:
    """The JSON that counts: what the launch names."""
    text = started.variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if text is None:
        if given is not None:
            raise InputError(
                f"{yaml_file} does not name {given}, so accelerate would not read it. Type "
                f"deepspeed_config: {{deepspeed_config_file: {given}}} in the YAML."
            )
        return None
    named = Path(text)
    if given is not None and given.resolve() != named.resolve():
        raise InputError(
            f"{yaml_file} names {named}, not {given}: accelerate would read the former. Type "
            f"deepspeed_config_file: {given} in the YAML."
        )
    return named


def _make(a: argparse.Namespace) -> int:
    from lbaccel.commands.plan import find_plan
    from lbaccel.configs.make import choose_stage, launch_command, name_of, pair
    from lbaccel.planning.text import lines
    from lbaccel.planning.zero import explain_zero

    a.zero = choose_stage(a.zero, a.offload, world_size=a.world_size)
    found = find_plan(a)
    shown = list(lines(replace(found, levers=(), alternatives=())))
    zero = list(explain_zero(found))
    print(printable("\n".join([*shown, *zero])))
    if not found.fits:
        needed = found.predicted_peak_gib
        print(
            f"does not fit with ZeRO-{a.zero}, offload {a.offload}: {needed:.2f} GiB of "
            f"{found.budget_gib:.2f}. Nothing is written. Use --memory {needed:.2f}GiB or more, "
            "more devices, or a smaller --img-size.",
            file=sys.stderr,
        )
        return 1
    command = launch_command(found, img_size=a.img_size)
    header = iter([f"{name_of(found)}, by lbaccel configs make", *shown, *zero, command])
    files = {a.to / path: content for path, content in pair(found, header).items()}
    written = write(files, force=a.force)
    print("")
    for path in written:
        print(printable(str(path)))
    prefix = "" if a.to.resolve() == Path.cwd() else f"cd {shlex.quote(str(a.to))} && "
    print(printable(f"{prefix}{command}"))
    return 0


def _table(rows: list[ResolvedValue]) -> list[str]:
    cells = [(row.key, _shown(row.value), row.decided_by, row.over) for row in rows]
    return columns([("key", "value", "decided by", "over"), *cells])


def _shown(value: object) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
