"""The recipe's options on learning rate, optimizer and run: a row a setting (no torch)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lbaccel.optim.scaling import CHOICES, CHOSEN, HELP, find_rule, rule_named
from lbaccel.recipe import bounds
from lbaccel.recipe.values import (
    SCHEDULED,
    ReadWith,
    has_momentum,
    holds,
    is_set,
    none_of,
    one_of,
    option,
    switch,
    words,
)


def rule_reads(setting: str) -> Callable[[str], bool]:
    """Whether the rule of a choice of --lr-scaling reads a setting; auto chooses linear or sqrt."""
    return lambda name: setting in (find_rule(name) or rule_named(CHOSEN[0])).reads


def has_reference(name: str) -> bool:
    """Whether the rate under a choice of --lr-scaling belongs to a batch: one given, or its own."""
    rule = find_rule(name)
    return rule is None or "base_batch_size" in rule.reads or rule.samples is not None


_WARMED = ReadWith("warmup", none_of("none"), "Use --warmup gradual")
_PATIENT = ReadWith("patience", is_set, "Use --patience, such as 5")
_TARGETED = ReadWith("target", is_set, "Use --target, such as 90")
_WANDB = ReadWith("log_with", holds("wandb"), "Use --log-with run_folder wandb")


@dataclass(frozen=True)
class RateOptions:
    """How fast, and for how long."""

    epochs: float = option(
        20.0,
        bounds.epochs,
        "passes over the training set",
        contract=False,
        length=True,
        common=True,
    )
    max_updates: int | None = option(
        None,
        bounds.count,
        "stop after so many updates; the schedule stays that of --epochs",
        shown="no limit",
        contract=False,
        length=True,
    )
    max_minutes: float | None = option(
        None,
        bounds.minutes,
        "in place of --epochs: as many as fit in so many minutes, by updates that are timed before "
        "the first; the schedule is fitted to them",
        shown="--epochs",
        over_time=True,
    )
    base_lr: float | None = option(
        None,
        bounds.positive,
        "learning rate at --base-batch-size",
        shown="0.1 (SGD) or 0.001; pretrained 0.01 or 0.0001; frozen BatchNorm 0.003 or 0.0003",
        common=True,
    )
    base_batch_size: int = option(
        256,
        bounds.count,
        "samples that --base-lr was tuned at",
        shown="256; under a batch schedule the first batch, if --base-lr is given",
        reads_with=(ReadWith("lr_scaling", has_reference, "Use --lr-scaling linear"),),
    )
    lr_scaling: str = option(
        "auto",
        str,
        f"rule from the base to the global batch; auto: linear for SGD, else sqrt; {HELP}",
        choices=CHOICES,
    )
    lr_exponent: float | None = option(
        None,
        bounds.not_negative,
        "p of --lr-scaling power: base lr x k^p",
        shown="not read",
        over_time=True,
        reads_with=(ReadWith("lr_scaling", rule_reads("lr_exponent"), "Use --lr-scaling power"),),
    )
    warmup: str = option(
        "gradual",
        str,
        "shape of the warmup",
        choices=("gradual", "constant", "stairs", "none"),
        shown="gradual; under a batch schedule none",
    )
    warmup_epochs: float | None = option(
        None,
        bounds.epochs_from_zero,
        "length of the warmup, epochs",
        shown="5, at most a quarter of --epochs",
        neutral=(0.0,),
        over_time=True,
        reads_with=(_WARMED,),
    )
    warmup_start: float | str = option(
        "reference",
        bounds.start_rate,
        "learning rate at the start: reference (base lr), zero or a number",
        reads_with=(_WARMED,),
    )
    schedule: str = option(
        "cosine",
        str,
        "decay after the warmup",
        choices=("constant", "cosine", "step", "multistep"),
        shown="cosine; under a batch schedule constant",
    )
    milestones: tuple[float, ...] = option(
        (),
        bounds.many_epochs,
        "epochs: the period of step, the steps of multistep and of --batch-schedule",
        shown="none; under a batch schedule 60 120 160 of 200, in proportion",
        over_time=True,
        reads_with=(
            ReadWith("schedule", one_of("step", "multistep"), "Use --schedule multistep"),
            SCHEDULED,
        ),
    )
    gamma: float = option(
        0.1,
        bounds.positive,
        "factor at each step",
        reads_with=(
            ReadWith("schedule", one_of("step", "multistep"), "Use --schedule step or multistep"),
        ),
    )
    final_lr: float = option(
        0.0,
        bounds.not_negative,
        "learning rate at the end of a cosine",
        over_time=True,
        reads_with=(ReadWith("schedule", one_of("cosine"), "Use --schedule cosine"),),
    )


@dataclass(frozen=True)
class OptimizerOptions:
    """How a gradient becomes a step."""

    optimizer: str = option("sgd", str, "any name of timm.optim (sgd is Nesterov's)", common=True)
    fused_optimizer: str = option(
        "auto",
        str,
        "torch's step in one kernel; auto: where it has one, not in fp16",
        choices=("auto", "no"),
        contract=False,
    )
    momentum: float = option(
        0.9,
        bounds.below_one,
        "of SGD and its kin",
        reads_with=(
            ReadWith("optimizer", has_momentum, "Use an optimizer of the SGD family, such as sgd"),
        ),
    )
    weight_decay: float | None = option(
        None,
        bounds.not_negative,
        "on weights; biases and norms are left out",
        shown="1e-4 (SGD) or 0.05",
    )
    decay_all: bool = option(False, switch, "weight decay on biases and norms too")
    layer_decay: float | None = option(
        None, bounds.share, "learning-rate factor from layer to layer downwards", shown="none"
    )
    head_lr_scale: float | None = option(
        None, bounds.positive, "learning-rate factor of the classifier", shown="1"
    )
    lr_groups: str = option(
        "none",
        str,
        "three: classifier 1, last five blocks 0.6, the rest 0.4 of the learning rate",
        choices=("none", "three"),
    )
    betas: tuple[float, ...] | None = option(
        None, bounds.many_below_one, "of Adam and its kin", shown="the optimizer's"
    )
    eps: float | None = option(
        None, bounds.positive, "of Adam and its kin", shown="the optimizer's"
    )
    momentum_correction: bool = option(
        False,
        switch,
        "rescale a momentum that holds the learning rate (rmsproptf) when that changes",
    )
    clip_grad_norm: float | None = option(
        None, bounds.positive, "largest norm of the summed gradient", shown="no clipping"
    )
    loss_dropout: tuple[float, ...] = option(
        (),
        bounds.many_from_zero,
        "first and last epoch in which an update of lower loss than the one before is dropped",
        shown="off",
        over_time=True,
    )
    ema_decay: float | None = option(
        None, bounds.below_one, "of an average of the weights, per update", shown="no average"
    )
    ema_warmup: str = option(
        "none",
        str,
        "start of the average: none (the initial weights), first (those of update 1), power (the "
        "same, with decay 1 - u^(-2/3) after update u until that is --ema-decay)",
        choices=("none", "first", "power"),
        reads_with=(ReadWith("ema_decay", is_set, "Add --ema-decay, such as 0.999"),),
    )
    ema_norm: str = option(
        "recalibrated",
        str,
        "BatchNorm's statistics in the average of the weights: measured on training images before "
        "each evaluation, or averages of the model's own",
        choices=("average", "recalibrated"),
        neutral=("average",),
        before="average",
        reads_with=(ReadWith("ema_decay", is_set, "Add --ema-decay, such as 0.999"),),
    )


@dataclass(frozen=True)
class RunOptions:
    """Where a run is written, and when it ends."""

    noise_scale: str = option(
        "auto",
        str,
        "measure the critical batch size; preconditioned: by Adam's moments too (dear); "
        "auto: plain, where an update has two micro-batches",
        choices=("auto", "plain", "preconditioned", "none"),
        contract=False,
    )
    resume: str | None = option(
        None,
        str,
        "go on: a run folder, a checkpoint in one, or 'auto' (the newest of this recipe)",
        shown="a new run",
        contract=False,
        of_run=False,
        private=True,
        common=True,
    )
    extend: str | None = option(
        None,
        str,
        "a resumed cosine with other --epochs: how the learning rate goes on",
        choices=("restart", "stretch", "constant"),
        shown="an error that shows the three",
        contract=False,
        of_run=False,
        private=True,
    )
    allow_changed: tuple[str, ...] = option(
        (),
        words,
        "settings of the contract that a resume may take changed, by name",
        shown="none",
        contract=False,
        of_run=False,
        private=True,
        repeatable=True,
    )
    max_hours: float | None = option(
        None,
        bounds.positive,
        "stop in good order after so long; --resume goes on",
        shown="no limit",
        contract=False,
        of_run=False,
        private=True,
    )
    patience: int | None = option(
        None,
        bounds.count,
        "end the run after so many evaluations without a better --monitor",
        shown="no early end",
        contract=False,
        length=True,
    )
    target: float | None = option(
        None,
        bounds.finite,
        "value of --monitor whose first reaching is noted in summary.json, and drawn by trackers",
        shown="none",
        contract=False,
    )
    monitor: str = option(
        "val/top1",
        str,
        "metric of --patience and of --target",
        choices=("val/top1", "val/loss", "val/top1_ema", "val/loss_ema"),
        contract=False,
        length=True,
        reads_with=(_PATIENT, _TARGETED),
    )
    seed: int = option(0, bounds.recipe_seed, "of weights, order, augmentation and split")
    output: str = option(
        "runs",
        str,
        "folder of run folders",
        contract=False,
        of_run=False,
        private=True,
        common=True,
    )
    log_every: int = option(1, bounds.count, "updates a line of metrics.jsonl", contract=False)
    eval_every: float = option(
        1.0, bounds.positive, "epochs between evaluations", contract=False, length=True
    )
    checkpoint_every: int | None = option(
        None, bounds.count, "updates between checkpoints", shown="at evaluations", contract=False
    )
    keep: int = option(2, bounds.count, "newest checkpoints kept, besides the best", contract=False)
    dry_run: bool = option(
        False,
        switch,
        "build everything, run two updates, write nothing",
        contract=False,
        of_run=False,
        private=True,
    )
    log_with: tuple[str, ...] = option(
        ("run_folder", "wandb"),
        words,
        "trackers: run_folder, wandb, and any of accelerate's, such as tensorboard",
        contract=False,
        private=True,
    )
    wandb_project: str = option(
        "lbaccel", str, "wandb project", contract=False, private=True, reads_with=(_WANDB,)
    )
    wandb_group: str | None = option(
        None, str, "wandb group", shown="none", contract=False, private=True, reads_with=(_WANDB,)
    )
    wandb_name: str | None = option(
        None,
        str,
        "wandb run name",
        shown="the run folder's",
        contract=False,
        private=True,
        reads_with=(_WANDB,),
    )
    wandb_tags: tuple[str, ...] = option(
        (), words, "wandb tags", shown="none", contract=False, private=True, reads_with=(_WANDB,)
    )
    wandb_artifacts: str = option(
        "none",
        str,
        "checkpoint that wandb gets as an artifact, once, when the run is done or its time is over",
        choices=("none", "best", "last"),
        contract=False,
        private=True,
        neutral=("none",),
        reads_with=(_WANDB,),
    )
    wandb_mode: str | None = option(
        None,
        str,
        "online, offline or disabled",
        choices=("online", "offline", "disabled"),
        shown="online if logged in, else offline",
        contract=False,
        private=True,
        reads_with=(_WANDB,),
    )
