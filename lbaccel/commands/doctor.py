"""`lbaccel doctor`: findings with their consequence and the line to type."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lbaccel.configs.shipped import find
from lbaccel.doctor.script import read_script
from lbaccel.errors import InputError
from lbaccel.recipe import bounds
from lbaccel.recipe.values import flag_of
from lbaccel.text import printable

if TYPE_CHECKING:  # flags and help need no torch
    from lbaccel.doctor.facts import Facts, Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files and the network to check; each flag is optional."""
    looked = parser.add_argument_group("what to look at, beside this environment")
    looked.add_argument("--config", metavar="YAML", help="a file, or the name of a shipped config")
    looked.add_argument("--ds-config", type=Path, metavar="JSON", help="default: the YAML's")
    looked.add_argument("--script", type=Path, metavar="PY", help="read, never run")
    network = parser.add_argument_group("what ZeRO can do for a network, before the run")
    network.add_argument("--model", help="any timm model; default: the script's, if written out")
    network.add_argument("--img-size", type=bounds.pixels, metavar="S", help="default: the model's")
    network.add_argument(
        "--global-batch-size", type=bounds.count, metavar="B", help="with it, a plan"
    )
    network.add_argument(
        "--micro-batch-size", type=bounds.count, metavar="N", help="default: planned"
    )
    network.add_argument(
        "--world-size", type=bounds.ranks, metavar="W", help="default: the YAML's, else 1"
    )
    network.add_argument("--memory", metavar="SIZE", help="such as 8GiB; default: the device's")
    network.add_argument("--device", metavar="NAME", help="such as 'RTX 4090' or cpu")
    network.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    network.add_argument("--optimizer", default="sgd", help="any name of timm.optim")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """0 where nothing was found, 1 with findings.

    Raises:
        InputError: files that can't be read, an unknown model, sizes that are none.
    """
    a = arguments
    if a.global_batch_size is not None and a.model is None and a.script is None:
        raise InputError("--global-batch-size plans for a network. Add --model resnet50, say.")
    for name in ("micro_batch_size", "world_size", "memory", "device", "img_size"):
        if a.global_batch_size is None and getattr(a, name) is not None:
            raise InputError(f"{flag_of(name)} is for a plan. Add --global-batch-size 4096, say.")
    from lbaccel.doctor.checks import CHECKS, diagnose
    from lbaccel.doctor.facts import gather, this_environment

    script = None if a.script is None else read_script(a.script)
    model = a.model or (script.model_name if script else None)
    yaml_path, json_path = _config(a.config)
    norm = None if model is None else _has_batch_norm(model, a.img_size)
    facts = gather(
        this_environment(),
        yaml_path=yaml_path,
        json_path=a.ds_config or json_path,
        script=script,
        model=model,
        has_batch_norm=norm,
        global_batch_size=a.global_batch_size,
        micro_batch_size=a.micro_batch_size,
        world_size=a.world_size,
    )
    findings = diagnose(facts)
    says = list(_says(a, facts))
    if a.json:
        found = {**_as_json(facts, findings, says), "checks": [check.name for check in CHECKS]}
        print(json.dumps(found))
    else:
        print(printable("\n".join(_lines(facts, findings, says, num_checks=len(CHECKS)))))
    return 1 if findings else 0


def _config(text: str | None) -> tuple[Path | None, Path | None]:
    """A YAML, or a shipped pair by its name."""
    if text is None:
        return None, None
    path = Path(text)
    if path.suffix or path.exists():
        return path, None
    shipped = find(text)
    return shipped.yaml, shipped.json


def _has_batch_norm(model: str, img_size: int | None) -> bool:
    import torch

    from lbaccel.models import create_backbone
    from lbaccel.update.normalization import has_batch_norm

    with torch.device("meta"):
        return has_batch_norm(create_backbone(model, num_classes=10, img_size=img_size))


def _says(a: argparse.Namespace, facts: Facts) -> Iterator[str]:
    """Sentences on the memory that ZeRO saves, and on the operators that DeepSpeed would build."""
    if facts.deepspeed:
        yield from _operators(facts)
    if facts.model is None or a.global_batch_size is None:
        return
    from lbaccel.planning.planner import plan
    from lbaccel.planning.zero import explain_zero

    world = facts.launch.world_size if facts.launch else a.world_size or 1
    found = plan(
        facts.model,
        global_batch_size=a.global_batch_size,
        img_size=a.img_size,
        memory=a.memory,
        world_size=world,
        device=a.device,
        precision=a.precision,
        optimizer=a.optimizer,
        micro_batch_size=a.micro_batch_size,
    )
    fits = "fits" if found.fits else f"does not fit: {found.why}"
    yield f"{found.model} on {found.device.name}: {found.batch}"
    yield f"peak {found.predicted_peak_gib:.2f} GiB of {found.budget_gib:.2f}: {fits}"
    yield from explain_zero(found)


def _operators(facts: Facts) -> Iterator[str]:
    from lbaccel.doctor.environment_checks import builds

    here = facts.environment
    needed = builds(facts)
    if not needed:
        yield "DeepSpeed builds no operator for this config: a torch optimizer needs none on a GPU"
        return
    yield f"DeepSpeed builds at the first start: {', '.join(needed)}"
    tools = {
        "C++ compiler": here.compiler,
        "ninja": here.packages.get("ninja"),
        "TORCH_EXTENSIONS_DIR": here.variables.get("TORCH_EXTENSIONS_DIR"),
    }
    if here.num_gpus:
        tools["nvcc"] = here.nvcc
        tools["CUDA_HOME"] = here.variables.get("CUDA_HOME")
    yield "  " + ", ".join(f"{name}: {value or 'none'}" for name, value in tools.items())


def _lines(
    facts: Facts, findings: list[Finding], says: list[str], *, num_checks: int
) -> Iterator[str]:
    here = facts.environment
    versions = [f"{name} {version}" for name, version in here.packages.items() if version]
    yield f"{', '.join(versions)}; {here.num_gpus} GPUs"
    looked = [facts.yaml_path, facts.json_path, facts.script.path if facts.script else ""]
    yield f"looked at: {', '.join(['this environment', *filter(None, looked)])}"
    yield from says
    for finding in findings:
        yield ""
        yield f"{finding.where}: {finding.found}   [{finding.check}]"
        yield f"  what comes of it: {finding.consequence}"
        yield f"  type: {finding.fix}"
    yield ""
    count = len(findings)
    yield f"{count or 'no'} finding{'' if count == 1 else 's'} in {num_checks} checks"


def _as_json(facts: Facts, findings: list[Finding], says: list[str]) -> dict[str, Any]:
    return {
        "findings": [vars(finding) for finding in findings],
        "says": says,
        "packages": dict(facts.environment.packages),
        "num_gpus": facts.environment.num_gpus,
    }
