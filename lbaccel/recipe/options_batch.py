"""The recipe's options on the batch and its plan: a row a setting (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lbaccel.batch.growth import PAST_MAX
from lbaccel.batch.rules import RULES as BATCH_RULES
from lbaccel.recipe import bounds
from lbaccel.recipe.values import (
    SCHEDULED,
    ReadWith,
    none_of,
    one_of,
    option,
    switch,
)

_AUTO = ReadWith("global_batch_size", one_of("auto"), "Use --global-batch-size auto")
_ROLLING = ReadWith(
    "norm_batch_size",
    none_of("frozen"),
    "Frozen statistics stay as they are: use --norm-batch-size 32",
)
_OF_GHOSTS = ReadWith(
    "norm_batch_size",
    none_of("frozen", "global"),
    "Frozen statistics stay as they are, and those of the whole batch move once an update: use "
    "--norm-batch-size 32",
)
_GLOBAL = ReadWith("norm_batch_size", one_of("global"), "Use --norm-batch-size global")


@dataclass(frozen=True)
class BatchOptions:
    """How many samples an update takes, and how they fit in memory."""

    global_batch_size: int | Literal["auto"] = option(
        512,
        bounds.samples_or_auto,
        "samples an update, over all ranks; experimental: auto grows it with the critical batch, "
        "from --min-batch-size to --max-batch-size",
        common=True,
    )
    min_batch_size: int | None = option(
        None,
        bounds.count,
        "of auto: samples an update at the start",
        shown="-",
        over_time=True,
        reads_with=(_AUTO,),
    )
    batch_decisions: str | None = option(
        None,
        str,
        "of auto: a run folder whose decisions are taken again, in place of measuring",
        shown="none",
        over_time=True,
        reads_with=(_AUTO,),
    )
    micro_batch_size: int | Literal["auto"] | None = option(
        None,
        bounds.samples_or_auto,
        "samples a forward of one rank, or 'auto'; no effect on the result",
        shown="64, or what is near it and a multiple of --norm-batch-size",
        contract=False,
        plan=True,
        common=True,
    )
    val_batch_size: int | None = option(
        None,
        bounds.count,
        "samples a forward of one rank in the evaluation; no effect on the result",
        shown="the micro-batch",
        contract=False,
        plan=True,
    )
    memory: str | None = option(
        None,
        str,
        "budget such as 8GiB, enforced",
        shown="what is free, less a margin, on a GPU and for auto",
        contract=False,
        plan=True,
        common=True,
    )
    host_memory: str | None = option(
        None,
        str,
        "of --norm-batch-size global: most that a rank's passes keep in host memory, such as 8GiB; "
        "no effect on the result",
        shown="what is free, on a CPU half of it",
        contract=False,
        plan=True,
        reads_with=(_GLOBAL,),
    )
    norm_batch_size: int | Literal["global", "frozen"] | None = option(
        None,
        bounds.norm_samples,
        "samples BatchNorm sees at once: a number, 'global' (the whole batch, in passes), or "
        "'frozen'",
        shown="32, at most the global batch and the training set",
    )
    bn_statistics: Literal["per_ghost", "per_update"] = option(
        "per_ghost",
        str,
        "running statistics move once a ghost batch or once an update",
        choices=("per_ghost", "per_update"),
        reads_with=(_OF_GHOSTS,),
    )
    bn_momentum: float | None = option(
        None,
        bounds.share,
        "share of the newest statistic at each move of BatchNorm's running statistics",
        shown="the model's",
        reads_with=(_ROLLING,),
    )
    last_update: Literal["wrap", "keep", "drop"] = option(
        "wrap",
        str,
        "an epoch's remainder: into the next epoch, a short update, or left out",
        choices=("wrap", "keep", "drop"),
        shown="wrap; under a batch schedule keep",
    )
    batch_schedule: str | None = option(
        None,
        str,
        "rule by which batch and learning rate change with the epochs; see `lbaccel schedule`",
        choices=BATCH_RULES,
        shown="the batch stays",
        over_time=True,
    )
    factor: tuple[float, ...] = option(
        (),
        bounds.many_positive,
        "of --batch-schedule: one, or one a milestone",
        shown="5; mixed 4 4 50; fast 2",
        over_time=True,
        reads_with=(SCHEDULED,),
    )
    max_batch_size: int | None = option(
        None,
        bounds.count,
        "largest batch of --batch-schedule and of auto",
        shown="the training set",
        over_time=True,
        reads_with=(
            SCHEDULED,
            _AUTO,
        ),
    )
    past_max: str = option(
        "drop",
        str,
        "what to do with the part of a growth factor that exceeds --max-batch-size: drop it, or "
        "divide the learning rate by it",
        choices=PAST_MAX,
        over_time=True,
        reads_with=(SCHEDULED,),
    )
    growth: float | None = option(
        None,
        bounds.positive,
        "fast, instant: factor of the batch, an epoch",
        shown="2",
        over_time=True,
        reads_with=(SCHEDULED,),
    )
    lr_growth: float | None = option(
        None,
        bounds.positive,
        "fast, instant: factor of the rate, an epoch",
        shown="1.3",
        over_time=True,
        reads_with=(SCHEDULED,),
    )
    batch_sizes: tuple[float, ...] = option(
        (),
        bounds.many_sizes,
        "listed: samples an update from each milestone on",
        shown="they stay",
        over_time=True,
        reads_with=(SCHEDULED,),
    )
    lr_factors: tuple[float, ...] = option(
        (),
        bounds.many_positive,
        "listed: multiples of the first rate from each milestone on",
        shown="it stays",
        over_time=True,
        reads_with=(SCHEDULED,),
    )
    first_epoch: int | None = option(
        None,
        bounds.count,
        "fast, instant: first larger batch",
        shown="6",
        over_time=True,
        reads_with=(SCHEDULED,),
    )
    activation_checkpointing: str = option(
        "none",
        str,
        "recompute in the backward pass; no effect on the result",
        choices=("none", "full", "auto"),
        contract=False,
        plan=True,
    )
    activation_offload: str = option(
        "none",
        str,
        "keep activations in the host's memory until backward where the plan needs it (auto); no "
        "effect on the result",
        choices=("none", "auto"),
        contract=False,
        plan=True,
    )
    memory_format: str = option(
        "contiguous",
        str,
        "of weights and images",
        choices=("contiguous", "channels_last", "auto"),
        contract=False,
        plan=True,
    )
    compile: bool = option(
        False,
        switch,
        "run training's forward and backward through torch.compile; evaluation stays as it is",
        contract=False,
        plan=True,
    )
    precision: str | None = option(
        None,
        str,
        "of the forward pass; fp64 proves a plan",
        choices=("fp32", "bf16", "fp16", "fp64"),
        shown="the launcher's, else fp32",
        common=True,
    )

    @property
    def follows_noise(self) -> bool:
        """Whether the batch grows with what is measured."""
        return self.global_batch_size == "auto"

    @property
    def first_size(self) -> int:
        """Samples of the first update."""
        if self.global_batch_size != "auto":
            return self.global_batch_size
        assert self.min_batch_size is not None, "checked settings have one"
        return self.min_batch_size
