"""The recipe's options, one table: name, type, default and help; and what turns text to a value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from lbaccel.batch_schedules import PAST_MAX
from lbaccel.batch_schedules import RULES as BATCH_RULES
from lbaccel.scaling import PER_SAMPLES, RULES


def switch(text: Any) -> bool:
    """True or False, from text or YAML."""
    if isinstance(text, bool):
        return text
    if str(text).lower() in ("true", "yes", "on", "1"):
        return True
    if str(text).lower() in ("false", "no", "off", "0"):
        return False
    raise ValueError("true or false")


def numbers(text: Any) -> tuple[float, ...]:
    """Floats, from '0.5 0.5', '0.5,0.5', a list or one number."""
    parts = text.replace(",", " ").split() if isinstance(text, str) else text
    return tuple(float(p) for p in (parts if isinstance(parts, (list, tuple)) else [parts]))


def words(text: Any) -> tuple[str, ...]:
    """Words, from 'a b', 'a,b' or a list."""
    parts = text.replace(",", " ").split() if isinstance(text, str) else text
    return tuple(str(p) for p in parts)


def whole(text: Any) -> int:
    """A whole number; 2.5 and true are none."""
    if isinstance(text, bool) or (isinstance(text, float) and not text.is_integer()):
        raise ValueError("a whole number")
    return int(text)


def group_samples(text: Any) -> int | str:
    """A whole number or 'frozen'."""
    return "frozen" if text == "frozen" else whole(text)


def samples_or_auto(text: Any) -> int | str:
    """A whole number or 'auto'."""
    return "auto" if text == "auto" else whole(text)


def start_rate(text: Any) -> float | str:
    """'reference', 'zero' or a learning rate."""
    return text if text in ("reference", "zero") else float(text)


@dataclass(frozen=True)
class Option:
    """One setting: its flag is `--name` with dashes, its YAML key `name`."""

    name: str
    parse: Callable[[Any], Any]
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    shown: str = ""  # the default in words, where it depends on other settings
    contract: bool = True  # decides the result; the others may differ in a resume
    may_be_none: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "may_be_none", self.default is None)


GROUPS: dict[str, tuple[Option, ...]] = {
    "model": (
        Option("model", str, "resnet10t", "any timm model"),
        Option("pretrained", switch, False, "start from timm's weights, or from --checkpoint"),
        Option("checkpoint", str, None, "weights file (.safetensors, .pth) to start from"),
        Option("num_classes", whole, None, "outputs", shown="the data's classes"),
        Option("drop_rate", float, 0.0, "dropout before the classifier, probability"),
        Option("drop_path", float, 0.0, "stochastic depth, probability"),
    ),
    "data": (
        Option("data", str, "digits", "digits, cifar10, cifar100, folder:PATH or parquet:PATH"),
        Option("val_fraction", float, 0.2, "share held out where the data has no validation set"),
        Option("workers", whole, 2, "processes that load image files, per rank", contract=False),
        Option(
            "img_size",
            whole,
            None,
            "pixels a side",
            shown="small images: their own; else the model's",
        ),
        Option(
            "stem",
            str,
            "auto",
            "small: stride 1 for images below 64 px",
            ("auto", "small", "native"),
        ),
        Option("mean", numbers, None, "per channel, of 0..1", shown="the model's"),
        Option("std", numbers, None, "per channel, of 0..1", shown="the model's"),
        Option(
            "interpolation",
            str,
            None,
            "bilinear or bicubic",
            ("bilinear", "bicubic"),
            "the model's",
        ),
        Option(
            "crop_pct", float, None, "share of the image kept in evaluation", shown="the model's"
        ),
        Option("label_smoothing", float, 0.0, "0..1"),
        Option("mixup", float, 0.0, "alpha; 0 is off"),
        Option("cutmix", float, 0.0, "alpha; 0 is off"),
        Option("auto_augment", str, None, "timm's policy, such as rand-m9-mstd0.5", shown="none"),
    ),
    "batch": (
        Option(
            "global_batch_size",
            samples_or_auto,
            512,
            "samples an update, over all ranks; experimental: auto grows it with the critical "
            "batch, from --min-batch-size to --max-batch-size",
        ),
        Option("min_batch_size", whole, None, "of auto: samples an update at the start", shown="-"),
        Option(
            "batch_decisions",
            str,
            None,
            "of auto: a run folder whose decisions are taken again, in place of measuring",
            shown="none",
        ),
        Option(
            "micro_batch_size",
            samples_or_auto,
            None,
            "samples a forward of one rank, or 'auto'; no effect on the result",
            shown="64, or what is near it and a multiple of --norm-batch-size",
            contract=False,
        ),
        Option(
            "memory",
            str,
            None,
            "budget such as 8GiB, enforced",
            shown="what is free, less a margin, on a GPU and for auto",
            contract=False,
        ),
        Option(
            "norm_batch_size",
            group_samples,
            None,
            "samples BatchNorm sees at once, or 'frozen'",
            shown="32, at most the global batch and the training set",
        ),
        Option(
            "bn_statistics",
            str,
            "per_ghost",
            "running statistics move once a ghost batch or once an update",
            ("per_ghost", "per_update"),
        ),
        Option(
            "bn_momentum",
            float,
            None,
            "share of the newest statistic at each move of BatchNorm's running statistics",
            shown="the model's",
        ),
        Option(
            "last_update",
            str,
            "wrap",
            "an epoch's remainder: into the next epoch, a short update, or left out",
            ("wrap", "keep", "drop"),
            "wrap; under a batch schedule keep",
        ),
        Option(
            "batch_schedule",
            str,
            None,
            "rule by which batch and learning rate change with the epochs; see `lbaccel schedule`",
            BATCH_RULES,
            "the batch stays",
        ),
        Option(
            "factor",
            numbers,
            (),
            "of --batch-schedule: one, or one a milestone",
            shown="5; mixed 4 4 50; fast 2",
        ),
        Option(
            "max_batch_size",
            whole,
            None,
            "largest batch of --batch-schedule and of auto",
            shown="the training set",
        ),
        Option(
            "past_max",
            str,
            "drop",
            "what of a factor has no room below --max-batch-size is lost, or divides the rate",
            PAST_MAX,
        ),
        Option("growth", float, None, "fast, instant: factor of the batch, an epoch", shown="2"),
        Option(
            "lr_growth", float, None, "fast, instant: factor of the rate, an epoch", shown="1.3"
        ),
        Option(
            "batch_sizes",
            numbers,
            (),
            "listed: samples an update from each milestone on",
            shown="they stay",
        ),
        Option(
            "lr_factors",
            numbers,
            (),
            "listed: multiples of the first rate from each milestone on",
            shown="it stays",
        ),
        Option("first_epoch", whole, None, "fast, instant: first larger batch", shown="6"),
        Option(
            "activation_checkpointing",
            str,
            "none",
            "recompute in the backward pass; no effect on the result",
            ("none", "full", "auto"),
            contract=False,
        ),
        Option(
            "memory_format",
            str,
            "contiguous",
            "of weights and images",
            ("contiguous", "channels_last", "auto"),
            contract=False,
        ),
        Option(
            "precision",
            str,
            None,
            "of the forward pass; fp64 proves a plan",
            ("fp32", "bf16", "fp16", "fp64"),
            "the launcher's, else fp32",
        ),
    ),
    "learning rate": (
        Option("epochs", float, 20.0, "passes over the training set", contract=False),
        Option(
            "max_updates",
            whole,
            None,
            "stop after so many updates; the schedule stays that of --epochs",
            shown="no limit",
            contract=False,
        ),
        Option(
            "base_lr",
            float,
            None,
            "learning rate at --base-batch-size",
            shown="0.1 (SGD) or 0.001; pretrained 0.01 or 0.0001",
        ),
        Option(
            "base_batch_size",
            whole,
            256,
            "samples that --base-lr was tuned at",
            shown="256; under a batch schedule the first batch, if --base-lr is given",
        ),
        Option(
            "lr_scaling",
            str,
            "auto",
            "rule from the base to the global batch; auto: linear for SGD, else sqrt; legw: sqrt, "
            "and --warmup-epochs x k; per-N: linear, --base-lr is per N samples; adascale: the "
            "measured gain of each update",
            ("auto", *RULES, *PER_SAMPLES, "adascale"),
        ),
        Option(
            "lr_exponent", float, None, "p of --lr-scaling power: base lr x k^p", shown="not read"
        ),
        Option(
            "warmup",
            str,
            "gradual",
            "shape of the warmup",
            ("gradual", "constant", "stairs", "none"),
            "gradual; under a batch schedule none",
        ),
        Option(
            "warmup_epochs",
            float,
            None,
            "length of the warmup, epochs",
            shown="5, at most a quarter of --epochs",
        ),
        Option(
            "warmup_start",
            start_rate,
            "reference",
            "learning rate at the start: reference (base lr), zero or a number",
        ),
        Option(
            "schedule",
            str,
            "cosine",
            "decay after the warmup",
            ("constant", "cosine", "step", "multistep"),
            "cosine; under a batch schedule constant",
        ),
        Option(
            "milestones",
            numbers,
            (),
            "epochs: the period of step, the steps of multistep and of --batch-schedule",
            shown="none; under a batch schedule 60 120 160 of 200, in proportion",
        ),
        Option("gamma", float, 0.1, "factor at each step"),
        Option("final_lr", float, 0.0, "learning rate at the end of a cosine"),
    ),
    "optimizer": (
        Option("optimizer", str, "sgd", "any name of timm.optim (sgd is Nesterov's)"),
        Option(
            "fused_optimizer",
            str,
            "auto",
            "torch's step in one kernel; auto: where it has one, not in fp16",
            ("auto", "no"),
            contract=False,
        ),
        Option("momentum", float, 0.9, "of SGD and its kin"),
        Option(
            "weight_decay",
            float,
            None,
            "on weights; biases and norms are left out",
            shown="1e-4 (SGD) or 0.05",
        ),
        Option("decay_all", switch, False, "weight decay on biases and norms too"),
        Option(
            "layer_decay",
            float,
            None,
            "learning-rate factor from layer to layer downwards",
            shown="none",
        ),
        Option("head_lr_scale", float, None, "learning-rate factor of the classifier", shown="1"),
        Option(
            "lr_groups",
            str,
            "none",
            "three: classifier 1, last five blocks 0.6, the rest 0.4 of the learning rate",
            ("none", "three"),
        ),
        Option("betas", numbers, None, "of Adam and its kin", shown="the optimizer's"),
        Option("eps", float, None, "of Adam and its kin", shown="the optimizer's"),
        Option(
            "momentum_correction",
            switch,
            False,
            "rescale a momentum that holds the learning rate (rmsproptf) when that changes",
        ),
        Option(
            "clip_grad_norm",
            float,
            None,
            "largest norm of the summed gradient",
            shown="no clipping",
        ),
        Option(
            "loss_dropout",
            numbers,
            (),
            "first and last epoch in which an update of lower loss than the one before is dropped",
            shown="off",
        ),
        Option(
            "ema_decay", float, None, "of an average of the weights, per update", shown="no average"
        ),
    ),
    "run": (
        Option(
            "noise_scale",
            str,
            "auto",
            "measure the critical batch size; preconditioned: by Adam's moments too (dear); "
            "auto: plain, where an update has two micro-batches",
            ("auto", "plain", "preconditioned", "none"),
            contract=False,
        ),
        Option(
            "resume",
            str,
            None,
            "go on: a run folder, a checkpoint in one, or 'auto' (the newest of this recipe)",
            shown="a new run",
            contract=False,
        ),
        Option(
            "extend",
            str,
            None,
            "a resumed cosine with other --epochs: how the learning rate goes on",
            ("restart", "stretch", "constant"),
            "an error that shows the three",
            contract=False,
        ),
        Option(
            "max_hours",
            float,
            None,
            "stop in good order after so long; --resume goes on",
            shown="no limit",
            contract=False,
        ),
        Option("seed", whole, 0, "of weights, order, augmentation and split"),
        Option("output", str, "runs", "folder of run folders", contract=False),
        Option("log_every", whole, 1, "updates a line of metrics.jsonl", contract=False),
        Option("eval_every", float, 1.0, "epochs between evaluations", contract=False),
        Option(
            "checkpoint_every",
            whole,
            None,
            "updates between checkpoints",
            shown="at evaluations",
            contract=False,
        ),
        Option("keep", whole, 2, "newest checkpoints kept, besides the best", contract=False),
        Option(
            "dry_run",
            switch,
            False,
            "build everything, run two updates, write nothing",
            contract=False,
        ),
        Option(
            "log_with",
            words,
            ("run_folder", "wandb"),
            "trackers: run_folder, wandb",
            contract=False,
        ),
        Option("wandb_project", str, "lbaccel", "wandb project", contract=False),
        Option("wandb_group", str, None, "wandb group", shown="none", contract=False),
        Option("wandb_name", str, None, "wandb run name", shown="the run folder's", contract=False),
        Option("wandb_tags", words, (), "wandb tags", shown="none", contract=False),
        Option(
            "wandb_mode",
            str,
            None,
            "online, offline or disabled",
            ("online", "offline", "disabled"),
            "online if logged in, else offline",
            contract=False,
        ),
    ),
}

OPTIONS = {option.name: option for group in GROUPS.values() for option in group}
