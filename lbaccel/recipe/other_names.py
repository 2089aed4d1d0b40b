"""Names of flags in timm, Hugging Face, ultralytics, fastai and torchvision, and ours for them.

A name of exactly one of our meanings is taken for ours. One that means something else is refused,
and the error states the difference: nothing that is typed changes its meaning in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

_FLAG = re.compile(r"--[a-z][a-z-]*")
_VISIBLE = (
    "A device is chosen outside: CUDA_VISIBLE_DEVICES=1 before the command takes the second GPU "
    "alone, and CUDA_VISIBLE_DEVICES= the CPU. Several GPUs need accelerate launch."
)
_PER_GPU = (
    "In timm, Hugging Face and torchvision it is the batch of one GPU: {value} on 4 GPUs without "
    "accumulation is --global-batch-size {times_4}. --micro-batch-size {value} is what one GPU "
    "holds at once; it changes no result."
)
_RATE = (
    "Elsewhere the rate is that of an update of any size. Here --base-lr is that of 256 samples "
    "(--base-batch-size): --base-lr {value} becomes {twice} at 512 with SGD, and {root_2} with "
    "AdamW. For {value} at every size, type --base-lr {value} --lr-scaling none."
)
_ACCUMULATION = (
    "It is derived: --global-batch-size / (--micro-batch-size x ranks). {value} steps of 64 on one "
    "GPU are --global-batch-size {times_64}."
)
_FROZEN = (
    "--train head trains the classifier alone, --train head+norms and --train bias+head a little "
    "more; --lr-groups three trains all, the layers below at lower rates."
)
_AVERAGED = "--ema-decay 0.9998 averages the weights with timm's decay an update."
_DECAY = "Type --schedule constant, cosine, step or multistep."
_ROWS = "Type --data folder:PATH, parquet:PATH, csv:FILE, hf:OWNER/NAME or timm:PATH."
_PROBABILITY = (
    "{name} of ultralytics is a probability, --{name} is alpha of Beta(alpha, alpha) and acts on "
    "every sample: type --{name} 0.2, say."
)
_SHARE_OF_TEACHER = (
    "--distill-alpha = d / (t + d), of distill_loss_weight d and task_loss_weight t."
)
_OF_LAUNCHER = "The launcher has it: accelerate launch with a file that lbaccel configs ls names."
_UPDATES_OF_WARMUP = (
    "The warmup is given in epochs: --warmup-epochs = updates x --global-batch-size / training "
    "images."
)
_EVALUATION = "Evaluations are counted in epochs, --eval-every 1, checkpoints in updates."
_ONE_INTERPOLATION = "Training and evaluation share one --interpolation."


@dataclass(frozen=True)
class OtherName:
    """A name from elsewhere.

    Attributes:
        ours: the flag of ours with the same meaning, which takes its place; "" is none.
        value: that flag's value, where the other one is a switch.
        hint: the difference and what to type, where there is no such flag. `{value}` stands for the
            value that was typed.
    """

    ours: str = ""
    value: str = ""
    hint: str = ""

    @property
    def needs(self) -> frozenset[str]:
        """The flags that a command has if this may be said to its user."""
        return frozenset([self.ours] if self.ours else _FLAG.findall(self.hint))

    def said(self, value: str) -> str:
        """The sentence to somebody who typed the name with this value ("" without one).

        >>> OtherName(hint="Type --global-batch-size {times_4}.").said("64")
        'Type --global-batch-size 256.'
        """
        if self.ours:
            return f"Here it is {' '.join(filter(None, [self.ours, self.value]))}."
        return self.hint.format_map(_numbers(value))


def same(ours: str, value: str = "") -> OtherName:
    """Another name of one of our flags, or of one of its values."""
    return OtherName(ours=ours, value=value)


def differs(hint: str) -> OtherName:
    """A name that means something else, or nothing here."""
    return OtherName(hint=hint)


# Without dashes at the start, with - for _: the names of the five tools in the order of our groups.
# With = at the end: as `key=value` alone, ultralytics' spelling, where --key is a flag of ours.
NAMES: Mapping[str, OtherName] = {
    # the model and its weights
    "arch": same("--model"),
    "model-name-or-path": differs("Type --model NAME, a name of timm's."),
    "weights": differs("--pretrained takes timm's weights, --pretrained --checkpoint FILE a file."),
    "pretrained-path": differs("Type --pretrained --checkpoint {value}."),
    "initial-checkpoint": differs(
        "--checkpoint {value} must fit the model; --pretrained --checkpoint {value} gives a new "
        "classifier where its number of classes differs."
    ),
    "drop": same("--drop-rate"),
    "dropout": same("--drop-rate"),
    "drop-connect": differs("timm calls it deprecated: type --drop-path {value}."),
    "freeze": differs(_FROZEN),
    "freeze-epochs": differs(_FROZEN),
    "freeze-backbone": differs(_FROZEN),
    "model-ema": differs(_AVERAGED),
    "model-ema-decay": differs(
        "--ema-decay {value} averages the weights with this decay an update. timm's average begins "
        "at update 1: --ema-warmup first."
    ),
    "model-ema-warmup": same("--ema-warmup", "power"),
    "ema": differs(_AVERAGED),
    # the data
    "data-dir": differs("Type --data folder:{value}."),
    "data-path": differs("Type --data folder:{value}."),
    "train-dir": differs("Type --data folder:PATH, the folder that holds train/ and val/."),
    "dataset": differs(_ROWS),
    "dataset-name": differs(_ROWS),
    "input-size": differs("Type --img-size with the pixels a side, such as --img-size 224."),
    "imgsz": same("--img-size"),
    "train-crop-size": differs(
        "Type --img-size {value}; --crop-pct is the share kept in evaluation."
    ),
    "train-interpolation": differs(_ONE_INTERPOLATION),
    "max-eval-samples": same("--max-val-samples"),
    "valid-pct": same("--val-fraction"),
    "j": same("--workers"),
    "num-workers": same("--workers"),
    "dataloader-num-workers": same("--workers"),
    "smoothing": same("--label-smoothing"),
    "label-smoothing-factor": same("--label-smoothing"),
    "bce-loss": same("--loss", "bce"),
    "kd-model-name": differs(
        "--teacher takes a trained network: a run, a checkpoint, an export or hf-hub:OWNER/NAME."
    ),
    "kd-temperature": same("--distill-temperature"),
    "kd-distill-type": differs("--teacher compares logits, by the Kullback-Leibler divergence."),
    "kd-loss-type": differs("--teacher compares logits, by the Kullback-Leibler divergence."),
    "task-loss-weight": differs(_SHARE_OF_TEACHER),
    "distill-loss-weight": differs(_SHARE_OF_TEACHER),
    "aa": same("--auto-augment"),
    "reprob": same("--random-erasing"),
    "random-erase": same("--random-erasing"),
    "erasing": same("--random-erasing"),
    "fliplr": same("--hflip"),
    "vflip": differs("Nothing turns images upside down; --hflip mirrors them from side to side."),
    "flipud": differs("Nothing turns images upside down; --hflip mirrors them from side to side."),
    "remode": differs("--random-erasing fills one box with noise (pixel)."),
    "recount": differs("--random-erasing fills one box with noise (pixel)."),
    "mixup-alpha": same("--mixup"),
    "cutmix-alpha": same("--cutmix"),
    "cutmix-minmax": differs("--cutmix takes alpha alone."),
    "mixup=": differs(_PROBABILITY.format(name="mixup")),
    "cutmix=": differs(_PROBABILITY.format(name="cutmix")),
    "mixup-prob": differs("--mixup and --cutmix take alpha alone: they are on for every sample."),
    "mixup-mode": differs("--mixup and --cutmix draw a share for each sample (elem)."),
    # the batch
    "b": differs(_PER_GPU),
    "bs": differs(_PER_GPU),
    "batch-size": differs(_PER_GPU),
    "train-batch-size": differs(_PER_GPU),
    "per-device-train-batch-size": differs(_PER_GPU),
    "batch": differs(
        "ultralytics accumulates its batches to nbs = 64 samples: batch={value} is "
        "--global-batch-size {nominal}. --micro-batch-size {value} is what one GPU holds at once; "
        "it changes no result."
    ),
    "vb": same("--val-batch-size"),
    "validation-batch-size": same("--val-batch-size"),
    "per-device-eval-batch-size": same("--val-batch-size"),
    "grad-accum-steps": differs(_ACCUMULATION),
    "gradient-accumulation-steps": differs(_ACCUMULATION),
    "accumulate": differs(_ACCUMULATION),
    "sync-bn": differs(
        "BatchNorm sees the --norm-batch-size samples of a ghost batch, whatever the GPUs."
    ),
    "dist-bn": differs("--bn-statistics are those of all ranks at each update."),
    "channels-last": same("--memory-format", "channels_last"),
    "grad-checkpointing": same("--activation-checkpointing", "full"),
    "gradient-checkpointing": same("--activation-checkpointing", "full"),
    "torchcompile": same("--compile"),
    "torch-compile": same("--compile"),
    "amp": differs(
        "timm's and torchvision's default is fp16, which needs a GPU: type --precision fp16, or "
        "--precision bf16."
    ),
    "amp-dtype": differs("Type --precision bf16, or --precision fp16."),
    "bf16": same("--precision", "bf16"),
    "fp16": same("--precision", "fp16"),
    "mixed-precision": differs("Type --precision bf16, fp16 or fp32."),
    # the rate
    "lr": differs(_RATE),
    "lr0": differs(_RATE),
    "learning-rate": differs(_RATE),
    "lr-max": differs(_RATE),
    "lr-base": differs(
        "Type --base-lr {value}. The rule that scales it, --lr-scaling auto, is linear for the SGD "
        "family and sqrt for all others; timm's is sqrt for names with ada or lamb alone."
    ),
    "lr-base-size": same("--base-batch-size"),
    "lr-base-scale": same("--lr-scaling"),
    "lrf": differs(
        "lrf is a share of the first rate, and --final-lr a rate: their product, lr0 x {value}."
    ),
    "min-lr": differs("Type --final-lr {value}; a cosine alone reads it."),
    "lr-min": differs("Type --final-lr {value}; a cosine alone reads it."),
    "warmup-lr": differs(
        "Type --warmup-start {value}, the rate of the first update: timm holds a rate for an epoch "
        "of the warmup, and here it moves at each update."
    ),
    "warmup-prefix": differs("--warmup-epochs are a part of --epochs: add them there."),
    "warmup-ratio": differs("It is a share of the run: --warmup-epochs = {value} x --epochs."),
    "warmup-steps": differs(_UPDATES_OF_WARMUP),
    "lr-warmup-epochs": same("--warmup-epochs"),
    "sched": differs(_DECAY),
    "sched-on-updates": differs("--schedule moves the rate at each update."),
    "cooldown-epochs": differs(
        "--schedule cosine ends with the run; --resume RUN --epochs N --extend constant goes on."
    ),
    "lr-scheduler": differs(_DECAY),
    "lr-scheduler-type": differs(_DECAY),
    "scheduler": differs(_DECAY),
    "cos-lr": differs("Type --schedule cosine; it is the default."),
    "decay-rate": same("--gamma"),
    "dr": same("--gamma"),
    "lr-gamma": same("--gamma"),
    "decay-epochs": differs(
        "Type --schedule step --milestones {value}, the period: here it runs from the end of the "
        "warmup, and in timm from the start of the run."
    ),
    "lr-step-size": differs(
        "Type --schedule step --milestones {value}: the period, counted from the end of the warmup."
    ),
    "decay-milestones": differs(
        "Type --schedule multistep --milestones with each epoch less 1: the 30 of timm acts from "
        "the start of its epoch 29 on."
    ),
    "num-train-epochs": same("--epochs"),
    "num-epochs": same("--epochs"),
    "n-epoch": same("--epochs"),
    "max-steps": differs(
        "Hugging Face fits the schedule to max_steps. --max-updates {value} stops there, and the "
        "schedule stays that of --epochs."
    ),
    "max-train-steps": differs(
        "The scripts of Hugging Face fit the schedule to it. --max-updates {value} stops there, "
        "and the schedule stays that of --epochs."
    ),
    # the optimizer
    "opt": same("--optimizer"),
    "optim": differs("Type --optimizer with a name of timm's: adamw for adamw_torch, sgd, lamb."),
    "wd": same("--weight-decay"),
    "opt-eps": same("--eps"),
    "adam-epsilon": same("--eps"),
    "opt-betas": same("--betas"),
    "adam-beta1": differs("Type both betas: --betas {value} 0.999."),
    "adam-beta2": differs("Type both betas: --betas 0.9 {value}."),
    "clip-grad": same("--clip-grad-norm"),
    "clip-mode": differs("--clip-grad-norm clips the norm of the whole gradient alone."),
    "max-grad-norm": same("--clip-grad-norm"),
    # the run
    "resume-from-checkpoint": differs("Type --resume RUN, or --resume auto for the newest run."),
    "early-stopping-patience": same("--patience"),
    "patience-epochs": differs(
        "It lowers timm's rate on a plateau. --patience {value} ends the run after so many "
        "evaluations that were no better."
    ),
    "eval-metric": differs("Type --monitor val/top1 with --patience."),
    "output-dir": differs("--output is the folder of all run folders; each run makes its own."),
    "project": differs("--output is the folder of all run folders; each run makes its own."),
    "experiment": differs("A run is named by its start; --wandb-name names it in wandb."),
    "run-name": differs("A run is named by its start; --wandb-name names it in wandb."),
    "log-interval": differs("Type --log-every {value}: updates a line; timm counts micro-batches."),
    "logging-steps": same("--log-every"),
    "val-interval": same("--eval-every"),
    "eval-steps": differs(_EVALUATION),
    "eval-strategy": differs(_EVALUATION),
    "save-steps": same("--checkpoint-every"),
    "save-total-limit": differs(
        "--keep {value} holds so many of the newest checkpoints, and the best beside them."
    ),
    "checkpoint-hist": differs(
        "--keep {value} holds so many of the newest checkpoints, and the best beside them."
    ),
    "report-to": differs("Type --log-with run_folder and the tracker, such as wandb."),
    "log-wandb": differs("wandb is on by default: --log-with run_folder wandb."),
    "cache": differs("Type --cache-images with a size, such as 8GiB: decoded images in memory."),
    # the device
    "device": differs(_VISIBLE),
    "cuda": differs(_VISIBLE),
    "gpu": differs(_VISIBLE),
    "gpus": differs(_VISIBLE),
    "no-cuda": differs(_VISIBLE),
    "use-cpu": differs(_VISIBLE),
    "deepspeed": differs(_OF_LAUNCHER),
    "fsdp": differs(_OF_LAUNCHER),
}


def other_name(flag: str, *, known: Collection[str]) -> OtherName | None:
    """The row of a name that is typed, where a command has the flags of `known`.

    >>> other_name("--opt", known=["--optimizer"]).ours
    '--optimizer'
    >>> other_name("--opt", known=["--json"]) is None  # of no use to a command without optimizers
    True
    """
    row = NAMES.get(flag.lstrip("-").replace("_", "-"))
    return row if row is not None and row.needs <= set(known) else None


def _numbers(value: str) -> dict[str, str]:
    """The value, and what a sentence may say of it; letters where there is no number."""
    try:
        number = float(value)
    except ValueError:
        shown = value or "X"
        return {
            "value": shown, "twice": f"2 x {shown}", "root_2": f"1.41 x {shown}",
            "times_4": f"4 x {shown}", "times_64": f"64 x {shown}", "nominal": "64",
        }  # fmt: skip
    nominal = max(round(64 / number), 1) * number if number >= 1 else 64
    return {
        "value": value, "twice": f"{2 * number:.3g}", "root_2": f"{2**0.5 * number:.3g}",
        "times_4": f"{4 * number:.10g}", "times_64": f"{64 * number:.10g}",
        "nominal": f"{nominal:.10g}",
    }  # fmt: skip
