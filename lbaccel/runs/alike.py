"""The ranks of a run agree on what they were started with, before they train (a collective)."""

from __future__ import annotations

import functools
import hashlib
import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from lbaccel.errors import InputError
from lbaccel.runs.environment import versions
from lbaccel.runs.folder import strict_json

PACKAGE = Path(__file__).parent.parent
_MOST = 8  # differences in a message
_LONGEST = 60  # characters of a value in a message


def check_alike(accelerator: Any, facts: Mapping[str, Any]) -> None:
    """Stop on every rank where the ranks hold different facts; a collective of all ranks.

    One digest a rank is compared; the facts themselves travel only where digests differ.

    Args:
        accelerator: of all ranks; with one process nothing is compared.
        facts: name to plain value, under names that the user knows.

    Raises:
        InputError: the facts that differ, with the ranks that hold each value.
    """
    if accelerator.num_processes == 1:
        return
    texts = {name: strict_json(value) for name, value in facts.items()}
    digests: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(digests, digest_of(texts))
    if len(set(digests)) == 1:
        return
    all_texts: list[Any] = [None] * accelerator.num_processes
    dist.all_gather_object(all_texts, texts)
    raise InputError(differences(all_texts))


def differences(held: Sequence[Mapping[str, str]]) -> str:
    """Which ranks differ in which facts.

    >>> print(differences([{"--seed": "0"}, {"--seed": "1"}, {"--seed": "0"}]))
    the ranks were not started alike, so they would not train one model: --seed is 0 on ranks 0, 2
    and 1 on rank 1. Start every rank with the same command, data, code and versions.
    """
    lines: list[str] = []
    for name in dict.fromkeys(name for facts in held for name in facts):
        values = [facts.get(name, "absent") for facts in held]
        if len(set(values)) > 1:
            common = [value for value, _ in Counter(values).most_common()]
            said = (f"{_short(value)} on {_ranks(values, value)}" for value in common[:_MOST])
            lines.append(f"{name} is {' and '.join(said)}")
    more = f"; and {len(lines) - _MOST} more differences" if len(lines) > _MOST else ""
    return (
        "the ranks were not started alike, so they would not train one model: "
        f"{'; '.join(lines[:_MOST])}{more}. "
        "Start every rank with the same command, data, code and versions."
    )


def _short(text: str) -> str:
    text = "none" if text == "null" else text
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _ranks(values: Sequence[str], value: str) -> str:
    ranks = [str(rank) for rank, held in enumerate(values) if held == value]
    more = f" and {len(ranks) - _MOST} more" if len(ranks) > _MOST else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:_MOST])}{more}"


def digest_of(value: Any) -> str:
    """A short digest of a plain value.

    >>> digest_of({"seed": 0}) == digest_of({"seed": 1})
    False
    """
    return hashlib.sha256(strict_json(value).encode()).hexdigest()[:16]


def software() -> dict[str, Any]:
    """Versions that a result depends on, and digests of lbaccel's code and of the user's script."""
    here = {"python": platform.python_version(), **versions()}
    here.pop("wandb", None)  # it only mirrors the metrics
    found = {f"version of {package}": version for package, version in here.items()}
    return {**found, "code of lbaccel": _code(), "the script": _script()}


@functools.cache
def _code() -> str:
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.rglob("*.py")):
        digest.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _script() -> str | None:
    """Of the file that was started; None where there is none, as in a notebook."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    try:
        return None if file is None else hashlib.sha256(Path(file).read_bytes()).hexdigest()[:16]
    except OSError:
        return None
