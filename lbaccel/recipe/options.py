"""All options of the recipe in their groups, and a run's settings: a value for each (no torch).

A row in `options_data`, `options_batch` or `options_training` is all that is said of an option:
name, type, default, help, who reads it, whether it decides the result. Lists of options are derived
from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from lbaccel.recipe.options_batch import BatchOptions
from lbaccel.recipe.options_data import DataOptions, ModelOptions
from lbaccel.recipe.options_training import OptimizerOptions, RateOptions, RunOptions
from lbaccel.recipe.values import Option


@dataclass(frozen=True)
class Settings:
    """A value for each option, in groups, and where each comes from.

    >>> s = Settings().with_values({"epochs": 30.0})
    >>> s.rate.epochs, s.batch.global_batch_size, s.value("seed")
    (30.0, 512, 0)
    """

    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    batch: BatchOptions = field(default_factory=BatchOptions)
    rate: RateOptions = field(default_factory=RateOptions)
    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    run: RunOptions = field(default_factory=RunOptions)
    origins: Mapping[str, str] = field(default_factory=dict)  # name: "flag", a file, or absent
    given: frozenset[str] = frozenset()  # what somebody asked for, by name
    asked: Mapping[str, Any] = field(default_factory=dict)  # of the contract, when the run began
    extensions: tuple[tuple[float, str | None], ...] = ()  # (epochs before, how it went on)
    identity: Mapping[str, Any] | None = None  # of the data, when the run began
    contract: Mapping[str, Any] | None = None  # of the checkpoint that a resume takes
    changes: tuple[Mapping[str, Any], ...] = ()  # of the contract, by --allow-changed
    notes: tuple[str, ...] = ()  # what a resume has to say

    def value(self, name: str) -> Any:
        """The value of an option by its name, for what walks the table."""
        return getattr(getattr(self, OPTIONS[name].group), name)

    def values(self) -> dict[str, Any]:
        """Name to value, in the table's order."""
        return {name: self.value(name) for name in OPTIONS}

    def with_values(self, changed: Mapping[str, Any]) -> Settings:
        """The same with other values, by name; origins and history stay."""
        groups = {
            group: replace(getattr(self, group), **of_group)
            for group in GROUPS
            if (of_group := {k: v for k, v in changed.items() if OPTIONS[k].group == group})
        }
        return replace(self, **groups)

    def origin(self, name: str) -> str:
        """Where a value comes from: "default", "flag", or a file."""
        return self.origins.get(name, "default")


def _rows(group: str, kind: Any) -> tuple[Option, ...]:
    return tuple(replace(f.metadata["row"], name=f.name, group=group) for f in fields(kind))


GROUPS: dict[str, tuple[Option, ...]] = {
    "model": _rows("model", ModelOptions),
    "data": _rows("data", DataOptions),
    "batch": _rows("batch", BatchOptions),
    "rate": _rows("rate", RateOptions),
    "optimizer": _rows("optimizer", OptimizerOptions),
    "run": _rows("run", RunOptions),
}
TITLES = {"rate": "learning rate"}  # of a group in --help, where it is not the group's name
OPTIONS = {row.name: row for group in GROUPS.values() for row in group}


def default_of(name: str) -> Any:
    """The default of an option."""
    return OPTIONS[name].default


def is_read(row: Option, settings: Settings) -> bool:
    """Whether the other settings make anything read this one.

    >>> is_read(OPTIONS["gamma"], Settings())  # its schedule is a cosine
    False
    """
    return not row.reads_with or any(r.holds(settings.value(r.other)) for r in row.reads_with)
