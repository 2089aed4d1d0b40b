"""The origin of a run's figures: command, commit, versions, hardware, plan, settings (no torch)."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import ASKED, ORIGIN, PLAN
from lbaccel.recipe.values import flag_of, shown
from lbaccel.runs.folder import ENVIRONMENT
from lbaccel.runs.read import Run, read_mapping
from lbaccel.text import without_tokens

_ONE_START = ("resume", "extend", "allow_changed")  # flags that are of one start of a run
_OF_THE_PLAN = {"equation": "plan", "lr": "learning rate", "world_size": "ranks"}


def provenance_of(one: Run, folder: Path | None) -> dict[str, Any]:
    """As the JSON of a study has it; what the run's files do not say is None or empty.

    Args:
        one: the run, with all of its settings.
        folder: of the run; None of a run that wandb holds.

    Returns:
        command, commit, versions, hardware, plan, origin and reproduce.
    """
    env = read_mapping(folder / ENVIRONMENT) if folder is not None else {}
    plan = _under(one.config, PLAN)
    command = without_tokens(str(env.get("command") or ""))
    versions = env.get("versions")
    return {
        "command": command or None,
        "commit": env.get("git_commit"),
        "versions": {
            **({"python": env["python"]} if env.get("python") else {}),
            **(versions if isinstance(versions, Mapping) else {}),
        },
        "hardware": _hardware(env),
        "plan": plan,
        "origin": _under(one.config, ORIGIN),
        "reproduce": reproduce(one.config, command),
    }


def _under(config: Mapping[str, Any], group: str) -> dict[str, Any]:
    start = f"{group}/"
    return {k.removeprefix(start): v for k, v in config.items() if k.startswith(start)}


def _hardware(env: Mapping[str, Any]) -> str | None:
    devices = env.get("devices")
    if not isinstance(devices, list) or not devices:
        return None
    parts = [", ".join(str(device) for device in devices)]
    if env.get("cpu_count"):
        parts.append(f"{env['cpu_count']} processors")
    if env.get("platform"):
        parts.append(str(env["platform"]))
    return ", ".join(parts)


def is_on_cpu(folder: Path | None) -> bool:
    """Whether a run had no other device, as far as its folder says."""
    env = read_mapping(folder / ENVIRONMENT) if folder is not None else {}
    return env.get("devices") == ["cpu"]


def reproduce(config: Mapping[str, Any], command: str) -> str | None:
    """One line of a shell that trains such a run again; None where the run does not say how.

    It states each setting that somebody gave, wherever it stood, so that it needs no other file.

    >>> reproduce({"model": "resnet50", "origin/model": "flag", "seed": 0}, "")
    'lbaccel train --model resnet50'
    """
    asked, origin = _under(config, ASKED), _under(config, ORIGIN)
    given = [name for name, how in origin.items() if how != "default"] or list(asked)
    values = {name: asked.get(name, config.get(name)) for name in given if name in OPTIONS}
    if not values:
        return command or None
    words = []
    for name, value in values.items():
        if name not in _ONE_START and value is not None and not OPTIONS[name].private:
            text = shown(value)
            words += [flag_of(name), *(text.split() if isinstance(value, list) else [text])]
    ranks = config.get(f"{PLAN}/world_size")
    start = ["lbaccel", "train"]
    if isinstance(ranks, int) and ranks > 1:
        start = ["accelerate", "launch", "--num_processes", str(ranks), "-m", "lbaccel.train"]
    return without_tokens(shlex.join([*start, *words]))


def entries(found: Mapping[str, Any]) -> dict[str, str]:
    """A provenance as titles and text, in the order in which it is read."""
    plan = found.get("plan") or {}
    origin = found.get("origin") or {}
    given = [f"{name} ({how})" for name, how in origin.items() if how != "default"]
    defaults = sum(how == "default" for how in origin.values())
    by_default = f"{defaults} settings by default" if defaults else ""
    rows = {
        "command": found.get("command"),
        "commit": found.get("commit"),
        "hardware": found.get("hardware"),
        "versions": _listed(found.get("versions") or {}),
        **{_OF_THE_PLAN.get(k, k): _text(v) for k, v in plan.items() if v not in (None, [], "")},
        "origin of the settings": "; ".join(filter(None, [", ".join(given), by_default])),
    }
    return {title: str(value) for title, value in rows.items() if value not in (None, "")}


def _listed(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _text(value: Any) -> str:
    return shown(value)


def shared_and_own(
    all_entries: Sequence[Mapping[str, str]],
) -> tuple[dict[str, str], list[dict[str, str]]]:
    """Entries that all runs have alike, and those that each has for itself; of one run all are own.

    >>> shared_and_own([{"commit": "a", "plan": "b"}, {"commit": "a", "plan": "c"}])
    ({'commit': 'a'}, [{'plan': 'b'}, {'plan': 'c'}])
    """
    if len(all_entries) < 2:
        return {}, [dict(one) for one in all_entries]
    first = all_entries[0]
    shared = {k: v for k, v in first.items() if all(one.get(k) == v for one in all_entries)}
    return shared, [{k: v for k, v in one.items() if k not in shared} for one in all_entries]
