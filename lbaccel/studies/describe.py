"""A study in words, as Markdown: source, arms, settings, and the source's own table (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lbaccel.recipe.values import shown
from lbaccel.studies.spec import BATCH, Publication, Study


def describe(scales: Mapping[str, Study]) -> str:
    """A study at all of its scales; the README of one that comes with lbaccel is this text.

    Args:
        scales: name to study; the first is the source's own.
    """
    first = next(iter(scales.values()))
    parts = [f"# {first.name}: {first.title}", first.question, _source(first.source)]
    parts += ["## Arms", *_arms(first)]
    parts += ["## Settings of all runs", _settings(first.settings)]
    if first.expected:
        parts += [f"## The source's {first.metric}, %", _expected(first)]
    parts += ["## Scales", "\n".join(_scale(name, study) for name, study in scales.items())]
    parts += ["## Run it", _commands(first, tuple(scales))]
    return "\n\n".join(part for part in parts if part) + "\n"


def describe_runs(study: Study) -> str:
    """Every place of a study with all of its settings."""
    parts = [f"# {study.name} at scale {study.scale}" if study.scale else f"# {study.name}"]
    for place in study.places():
        settings = study.cell(place, study.seeds[0]).settings
        own = {k: v for k, v in settings.items() if k not in ("seed", BATCH)}
        parts.append(f"## {place.arm} at {place.batch:,}\n\n{_settings(own)}")
    return "\n\n".join(parts) + "\n"


def cited(source: Publication) -> str:
    """Authors, title and year, as far as they are known.

    >>> cited(Publication("Keskar et al.", "On Large-Batch Training", 2017))
    'Keskar et al., "On Large-Batch Training", 2017'
    """
    parts = [source.authors, f'"{source.title}"', str(source.year) if source.year else ""]
    return ", ".join(part for part in parts if part)


def _source(source: Publication | None) -> str:
    if source is None:
        return ""
    return f"Source: {cited(source)}" + (f"; {source.where}." if source.where else ".")


def _arms(study: Study) -> list[str]:
    lines = []
    for arm in study.arms:
        line = f"- **{arm.name}**: {arm.title}."
        if arm.settings:
            line += " " + _inline(arm.settings)
        if arm.batches:
            line += f" At {_numbers(arm.batches)} alone."
        lines.append(line)
        for batch, settings in arm.per_batch.items():
            lines.append(f"  - at {batch:,}: {_inline(settings)}")
    return ["\n".join(lines)]


def _settings(settings: Mapping[str, Any]) -> str:
    rows = [f"| `{name}` | {_value(value)} |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])


def _inline(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}` {_value(value)}" for name, value in settings.items()) + "."


def _value(value: Any) -> str:
    if value is None:
        return "left out"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_value(of)}" for key, of in value.items())
    return shown(value)


def _expected(study: Study) -> str:
    batches = sorted({batch for of in study.expected.values() for batch in of})
    head = ["| arm | " + " | ".join(f"{batch:,}" for batch in batches) + " |"]
    head.append("|---" * (len(batches) + 1) + "|")
    for arm, numbers in study.expected.items():
        cells = [f"{numbers[batch]:.2f}" if batch in numbers else "" for batch in batches]
        head.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(head)


def _scale(name: str, study: Study) -> str:
    runs = len(study.cells())
    text = f"- **{name}**: " if name else "- "
    text += f"batch sizes {_numbers(study.batches)}; {len(study.places())} places x "
    text += f"{len(study.seeds)} seeds = {runs} runs."
    return f"{text} {study.note[0].upper()}{study.note[1:]}" if study.note else text


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(f"{value:,}" for value in values)


def _commands(study: Study, scales: tuple[str, ...]) -> str:
    scale = f" --scale {scales[0]}" if scales[0] else ""
    smallest = f" --scale {scales[-1]}" if scales[-1] else ""
    return "\n".join(
        [
            "```",
            f"lbaccel study plan {study.name}{scale}",
            f"lbaccel study run {study.name}{smallest}",
            f"lbaccel study run {study.name}{scale} --data parquet:FOLDER --jobs 2",
            "```",
        ]
    )
