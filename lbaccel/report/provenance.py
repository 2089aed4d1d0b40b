"""The origin of a run's figures: command, commit, versions, hardware, plan, settings (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lbaccel.recipe.settings import ORIGIN
from lbaccel.recipe.values import shown
from lbaccel.runs.read import Run
from lbaccel.studies.provenance import provenance
from lbaccel.text import without_tokens

_OF_THE_PLAN = {"equation": "plan", "lr": "learning rate", "world_size": "ranks"}


def provenance_of(one: Run, folder: Path | None) -> dict[str, Any]:
    """As the JSON of a study has it, for a run of the recipe or of a loop of your own.

    Args:
        one: the run, with all of its settings.
        folder: of the run; None of a run that wandb holds.
    """
    found = provenance(one, folder)
    if not any(key.startswith(f"{ORIGIN}/") for key in one.config):  # of a loop of your own
        found["reproduce"] = found["command"] or ""
    return {**found, "reproduce": without_tokens(found["reproduce"])}


def is_on_cpu(found: Mapping[str, Any]) -> bool:
    """Whether a run had no other device, as far as its provenance says."""
    return found["devices"] == ["cpu"]


def entries(found: Mapping[str, Any]) -> dict[str, str]:
    """A provenance as titles and text, in the order in which it is read."""
    plan = found.get("plan") or {}
    origin = found.get("origin") or {}
    given = [f"{name} ({how})" for name, how in origin.items() if how != "default"]
    rows = {
        "command": without_tokens(found.get("command") or ""),
        "commit": found.get("commit"),
        "hardware": found.get("hardware"),
        "versions": _listed(found.get("versions") or {}),
        **{_OF_THE_PLAN.get(k, k): _text(v) for k, v in plan.items() if v not in (None, [], "")},
        "origin of the settings": ", ".join(given),
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
