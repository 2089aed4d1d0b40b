"""A study as it is written down: arms, batch sizes and seeds, at several scales (no torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

BATCH, NORM = "global_batch_size", "norm_batch_size"
NO_NORM = "none"  # the network has no BatchNorm: stated, and not given to the run
SCALES = ("paper", "small", "smoke")


@dataclass(frozen=True)
class Arm:
    """One way to train, at each of the study's batch sizes.

    Attributes:
        name: a word, part of the names of folders.
        title: a phrase for readers.
        settings: of `lbaccel train`, beside those of the study.
        batches: where the arm is run; empty is at all batch sizes of the study.
        per_batch: settings of single batch sizes.
    """

    name: str
    title: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    batches: tuple[int, ...] = ()
    per_batch: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Publication:
    """The publication that a study repeats.

    Attributes:
        authors, title, year: of it; year 0 is unknown.
        where: tables, figures or sections.
    """

    authors: str
    title: str
    year: int = 0
    where: str = ""


@dataclass(frozen=True)
class Target:
    """A value of a metric whose first reaching is counted in updates and samples."""

    metric: str
    value: float


@dataclass(frozen=True)
class ArmBatch:
    """An arm at a batch size."""

    arm: str
    batch: int


@dataclass(frozen=True)
class ArmPair:
    """Two arms that are compared at each batch size, or at one each, seed by seed.

    Attributes:
        arm, against: names of arms.
        batch, against_batch: None: each batch size that both have.
    """

    arm: str
    against: str
    batch: int | None = None
    against_batch: int | None = None


@dataclass(frozen=True)
class Surface:
    """A loss landscape around the weights that a place's first seed ended with.

    Attributes:
        place: whose last checkpoint it is of.
        x, y: LOW:HIGH:POINTS of `lbaccel landscape`; y "" is a curve.
        samples: images of the training set; 0 is all.
    """

    place: ArmBatch
    x: str = "-1:1:51"
    y: str = ""
    samples: int = 0

    @property
    def name(self) -> str:
        """Of its folder; a word."""
        kind = "2d" if self.y else "1d"
        return f"{self.place.arm}-gbs{self.place.batch}-{kind}"


@dataclass(frozen=True)
class Tune:
    """A grid of one setting, the same for every arm and batch size.

    Attributes:
        setting: its name.
        values: factors of the setting's own value at each place, or values.
        relative: they are factors.
    """

    setting: str
    values: tuple[float, ...]
    relative: bool = True

    def at(self, own: float) -> tuple[float, ...]:
        """The values at a place whose own value is `own`.

        >>> Tune("base_lr", (0.5, 1.0, 2.0)).at(0.1)
        (0.05, 0.1, 0.2)
        """
        return tuple(own * v for v in self.values) if self.relative else self.values

    def __str__(self) -> str:
        values = ",".join(map(exact, self.values))
        return f"{self.setting} {'x ' if self.relative else ''}{values}"


def exact(value: float) -> str:
    """A number in as many digits as it needs to be read back.

    >>> exact(0.05), exact(1 / 3)
    ('0.05', '0.3333333333333333')
    """
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


@dataclass(frozen=True)
class Study:
    """A study at one scale, read and checked.

    Attributes:
        name: a word.
        scale: one of `SCALES`, or "" where the file has none.
        title, question: a line, and what the study asks.
        source: None where it repeats no publication.
        settings: of all runs.
        arms: in order; the first is the baseline's where `baseline` is None.
        batches: global batch sizes, ascending.
        seeds: whole numbers.
        metric: the result, of which each run gives the median of its last `last` evaluations.
        last: how many evaluations that median takes.
        baseline: the place that every other one is compared with.
        pairs: what else is compared.
        target: None: nothing is timed.
        spread: standard deviation over seeds of one run's metric that the plan supposes, points.
        fixed: settings that the study is about; no tuning may move them.
        expected: arm to batch to the source's own number.
        note: where this scale departs from the source, a text.
        tune: the grid that is searched first; None is none.
        landscapes: what is drawn when the runs have ended.
        pinned: names of settings that were typed, and that hold in every arm.
    """

    name: str
    scale: str
    title: str
    question: str
    source: Publication | None
    settings: Mapping[str, Any]
    arms: tuple[Arm, ...]
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    metric: str = "val/top1"
    last: int = 5
    baseline: ArmBatch | None = None
    pairs: tuple[ArmPair, ...] = ()
    target: Target | None = None
    spread: float = 0.4
    fixed: tuple[str, ...] = ()
    expected: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    note: str = ""
    tune: Tune | None = None
    landscapes: tuple[Surface, ...] = ()
    pinned: tuple[str, ...] = ()

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(one for one in self.arms if one.name == name)

    def places(self) -> list[ArmBatch]:
        """Every arm at each of its batch sizes, in order."""
        return [ArmBatch(arm.name, b) for arm in self.arms for b in arm.batches or self.batches]

    def cells(self) -> list[StudyCell]:
        """Every run of the study, the first seed of all places first."""
        return [self.cell(place, seed) for seed in self.seeds for place in self.places()]

    def stated(self, place: ArmBatch) -> Mapping[str, Any]:
        """The settings that the study states for an arm at a batch size, as they are written."""
        return self._merged(place)

    def cell(
        self, place: ArmBatch, seed: int, *, more: Mapping[str, Any] | None = None
    ) -> StudyCell:
        """The run of an arm at a batch size with a seed; `more` settings are laid on top."""
        merged = self._merged(place, more or {}, {BATCH: place.batch, "seed": seed})
        if merged.get(NORM) == NO_NORM:
            del merged[NORM]
        settings = {  # null leaves a setting of a layer below out
            name: of_batch(value, place.batch)
            for name, value in merged.items()
            if value is not None
        }
        return StudyCell(place.arm, place.batch, seed, settings)

    def _merged(self, place: ArmBatch, *more: Mapping[str, Any]) -> dict[str, Any]:
        arm = self.arm(place.arm)
        layers = (
            self.settings,
            arm.settings,
            arm.per_batch.get(place.batch, {}),
            {name: self.settings[name] for name in self.pinned},
            *more,
        )
        merged: dict[str, Any] = {}
        for layer in layers:
            merged |= layer
        return merged


@dataclass(frozen=True)
class StudyCell:
    """One run of a study, before it is run: a value for each setting that the study names."""

    arm: str
    batch: int
    seed: int
    settings: Mapping[str, Any]
    variant: str = ""  # of tuning, such as base_lr-0.05

    @property
    def name(self) -> str:
        """Of its folder; a word.

        >>> StudyCell("linear", 256, 0, {}).name
        'linear-gbs256-seed0'
        """
        end = f"-{self.variant}" if self.variant else ""
        return f"{self.arm}-gbs{self.batch}-seed{self.seed}{end}"


def of_batch(value: Any, batch: int) -> Any:
    """A value of a study's file at a batch size: `batch`, `batch / 4` and `batch x 2` are of it.

    >>> of_batch("batch", 256), of_batch("batch / 4", 256), of_batch("cosine", 256)
    (256, 64, 'cosine')
    """
    if not isinstance(value, str):
        return value
    words: Sequence[str] = value.split()
    if words == ["batch"]:
        return batch
    if len(words) == 3 and words[0] == "batch" and words[2].isdecimal() and int(words[2]):
        number = int(words[2])
        if words[1] == "/" and batch % number == 0:
            return batch // number
        if words[1] == "x":
            return batch * number
    return value
