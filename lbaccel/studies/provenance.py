"""Where the numbers of a run come from: command, versions, machine, and a line to run it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.network_arguments import as_words
from lbaccel.recipe.experiment import joined
from lbaccel.recipe.options import OPTIONS
from lbaccel.recipe.settings import EXTENSIONS, ORIGIN, PLAN
from lbaccel.runs.folder import ENVIRONMENT, plain
from lbaccel.runs.read import Run, read_mapping

_LENGTH_OF_TIME = "max_minutes"


def provenance(run: Run, folder: Path | None) -> dict[str, Any]:
    """Command, commit, versions, hardware, plan, origin of each setting, and a line to copy.

    Args:
        run: with the whole flat config.yaml.
        folder: of the run, where its `env.json` lies; None knows no machine.

    Raises:
        InputError: `env.json` is broken.
    """
    env = {} if folder is None else read_mapping(folder / ENVIRONMENT)
    versions = env.get("versions")
    return {
        "command": env.get("command"),
        "commit": env.get("git_commit"),
        "versions": dict(versions) if isinstance(versions, Mapping) else {},
        "hardware": hardware(env),
        "devices": _devices(env),
        "plan": _group(run.config, PLAN),
        "origin": {k: v for k, v in _group(run.config, ORIGIN).items() if v != "default"},
        "reproduce": reproduce(run.config),
    }


def _group(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    start = f"{name}/"
    return {k.removeprefix(start): v for k, v in config.items() if k.startswith(start)}


def _devices(env: Mapping[str, Any]) -> list[str]:
    found = env.get("devices")
    return [str(one) for one in found] if isinstance(found, list) else []


def hardware(env: Mapping[str, Any]) -> str | None:
    """The machine of an `env.json` in words; None where it says nothing.

    >>> hardware({"devices": ["cpu"], "cpu_count": 2, "platform": "Linux", "python": "3.12.1"})
    'cpu (2 cores), Linux, Python 3.12.1'
    """
    named, count = _devices(env), env.get("cpu_count")
    kinds = [
        f"{named.count(one)} x {one}" if named.count(one) > 1 else one
        for one in dict.fromkeys(named)
    ]
    words = [", ".join(kinds)] if kinds else []
    if words and count:
        words = [f"{words[0]} ({count} cores)"]
    words += [str(env["platform"])] if env.get("platform") else []
    words += [f"Python {env['python']}"] if env.get("python") else []
    return ", ".join(words) or None


def reproduce(config: Mapping[str, Any]) -> str:
    """A shell line that runs the same experiment again, out of a run's flat config.yaml.

    It has the settings that decide the result or the length of training and that somebody gave,
    in the table's order. How an update fits the machine is left out, since it changes no result.

    >>> reproduce({"data": "folder:my photos", "seed": 3, "momentum": 0.9, "workers": 8})
    "lbaccel train --data 'folder:my photos' --seed 3"
    """
    words, config = ["lbaccel", "train"], joined(config)
    for name, row in OPTIONS.items():
        if name in config and (row.contract or row.length) and _is_said(name, config):
            words += [row.flag, *_words(config[name])]
    line = shlex.join(words)
    if config.get(EXTENSIONS):
        return f"{line}  # this run was extended after that: see config.yaml"
    return line


def _is_said(name: str, config: Mapping[str, Any]) -> bool:
    value, default = config[name], plain(OPTIONS[name].default)
    fitted = config.get(_LENGTH_OF_TIME) is not None  # the epochs that fitted stand in its place
    if name == _LENGTH_OF_TIME or value is None or value in ([], {}):
        return False
    if name == "epochs" and fitted:
        return True
    if config.get(f"{ORIGIN}/{name}", "") == "default":
        return False
    # a batch schedule has defaults of its own
    return value != default or config.get("batch_schedule") is not None


def _words(value: Any) -> list[str]:
    """A value as the words behind its flag."""
    if isinstance(value, Mapping):
        return as_words(value)
    listed = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return [_typed(one) for one in listed]


def _typed(value: Any) -> str:
    """A value as a word of the command line, with all its digits."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return str(value)
