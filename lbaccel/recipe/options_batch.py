"""The recipe's options on model, data and batch: a class a group, a row a setting (no torch)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lbaccel.batch.growth import PAST_MAX
from lbaccel.batch.rules import RULES as BATCH_RULES
from lbaccel.recipe import bounds
from lbaccel.recipe.values import (
    SCHEDULED,
    ReadWith,
    is_set,
    none_of,
    numbers,
    one_of,
    option,
    switch,
    word_or_numbers,
)

_AUTO = ReadWith("global_batch_size", one_of("auto"), "Use --global-batch-size auto")
_MEMORY = ("digits", "cifar10", "cifar100")
# timm's training transform is for files, and for images in memory where it has a policy
_TRANSFORMED = (
    ReadWith("data", none_of(*_MEMORY), "Use images in files, such as folder:PATH"),
    ReadWith("auto_augment", is_set, "Use --auto-augment, under which they take timm's crop"),
)
_ROLLING = ReadWith(
    "norm_batch_size",
    none_of("frozen"),
    "Frozen statistics stay as they are: use --norm-batch-size 32",
)


def _is_from_outside(data: str) -> bool:
    return data.partition(":")[0] not in ("digits", "cifar10", "cifar100", "synthetic")


def _names_files(data: str) -> bool:
    return data.partition(":")[0] in ("folder", "csv", "timm")


@dataclass(frozen=True)
class ModelOptions:
    """The backbone, and the weights it starts from."""

    model: str = option("resnet10t", str, "any timm model")
    pretrained: bool = option(False, switch, "start from timm's weights, or from --checkpoint")
    checkpoint: str | None = option(None, str, "weights file (.safetensors, .pth) to start from")
    head_init: str = option(
        "zero",
        str,
        "where a pretrained model gets a new classifier: zero, or model (as timm draws it)",
        choices=("zero", "model"),
        reads_with=(ReadWith("pretrained", one_of(True), "Use --pretrained"),),
    )
    train: str = option(
        "full",
        str,
        "parameters that are trained: all, the classifier, the classifier and norms, or the "
        "classifier and biases; the rest is frozen, and BatchNorm too except under full and "
        "head+norms",
        choices=("full", "head", "head+norms", "bias+head"),
    )
    num_classes: int | None = option(None, bounds.classes, "outputs", shown="the data's classes")
    drop_rate: float = option(0.0, bounds.below_one, "dropout before the classifier, probability")
    drop_path: float = option(0.0, bounds.below_one, "stochastic depth, probability")


@dataclass(frozen=True)
class DataOptions:
    """Images, and what is done to them."""

    data: str = option(
        "digits",
        str,
        "digits, cifar10, cifar100, folder:PATH, parquet:PATH, csv:FILE, hf:OWNER/NAME[:split], "
        "timm:PATH or synthetic[:CLASSESxSIZE]",
    )
    data_digest: str = option(
        "sizes",
        str,
        "how a resume knows the images again: names, labels and sizes of files, or their bytes too "
        "(reads them all at each start)",
        choices=("sizes", "bytes"),
        contract=False,
    )
    val_fraction: float = option(
        0.2,
        bounds.share_held_out,
        "share held out where the data has no validation set",
        reads_with=(
            ReadWith(
                "data",
                none_of("cifar10", "cifar100"),
                "Its validation set is its own: use other data",
            ),
        ),
    )
    test_split: str = option(
        "test",
        str,
        "what a test set (test/, test-*.parquet) is where there is no validation set beside it: "
        "test, which training never touches, or val",
        choices=("test", "val"),
        reads_with=(
            ReadWith(
                "data",
                _is_from_outside,
                "Its validation set is fixed: use folder:PATH or parquet:PATH",
            ),
        ),
        before="val",
    )
    exif_orientation: bool = option(
        True,
        switch,
        "turn photographs upright as their EXIF entry says",
        reads_with=(
            ReadWith(
                "data",
                _is_from_outside,
                "Its images have no EXIF entry: use folder:PATH or parquet:PATH",
            ),
        ),
        before=False,
    )
    skip_corrupt: bool = option(
        False,
        switch,
        "read all image files first, leave out those that can't be read, and list them in "
        "skipped.json of the run",
        reads_with=(
            ReadWith("data", _names_files, "Only image files are read first: use folder:PATH"),
        ),
    )
    workers: int = option(
        2, bounds.workers, "processes that load image files, per rank", contract=False
    )
    img_size: int | None = option(
        None, bounds.pixels, "pixels a side", shown="small images: their own; else the model's"
    )
    stem: str = option(
        "auto", str, "small: stride 1 for images below 64 px", choices=("auto", "small", "native")
    )
    mean: tuple[float, ...] | None = option(
        None, numbers, "per channel, of 0..1", shown="the model's"
    )
    std: tuple[float, ...] | None = option(
        None, numbers, "per channel, of 0..1", shown="the model's"
    )
    interpolation: str | None = option(
        None, str, "bilinear or bicubic", choices=("bilinear", "bicubic"), shown="the model's"
    )
    crop_pct: float | None = option(
        None,
        bounds.share,
        "share of the image kept in evaluation",
        shown="the model's",
        reads_with=(
            ReadWith(
                "data",
                none_of(*_MEMORY),
                "Images in memory are evaluated whole: use folder:PATH or parquet:PATH",
            ),
        ),
    )
    loss: str = option(
        "ce", str, "cross-entropy, or binary cross-entropy of each class", choices=("ce", "bce")
    )
    class_weights: str | tuple[float, ...] | None = option(
        None,
        word_or_numbers,
        "weights of the classes in the loss: balanced (N / (C n_c)), or a YAML or CSV file of "
        "class: weight",
        shown="all 1",
        reads_with=(ReadWith("loss", one_of("ce"), "Use --loss ce"),),
    )
    label_smoothing: float = option(0.0, bounds.below_one, "0..1")
    mixup: float = option(0.0, bounds.not_negative, "alpha; 0 is off")
    cutmix: float = option(0.0, bounds.not_negative, "alpha; 0 is off")
    auto_augment: str | None = option(
        None, str, "timm's policy, such as rand-m9-mstd0.5", shown="none"
    )
    scale: tuple[float, ...] | None = option(
        None,
        bounds.many_positive,
        "least and largest share of the image's area in a random crop",
        shown="0.08 1",
        reads_with=_TRANSFORMED,
    )
    ratio: tuple[float, ...] | None = option(
        None,
        bounds.many_positive,
        "least and largest width / height of a random crop",
        shown="0.75 1.3333",
        reads_with=_TRANSFORMED,
    )
    hflip: float | None = option(
        None, bounds.probability, "probability of a mirror image", shown="0.5; digits 0"
    )
    color_jitter: float | None = option(
        None,
        bounds.not_negative,
        "strength of random brightness, contrast and saturation; 0 is off",
        shown="0.4; off beside a policy",
        reads_with=(_TRANSFORMED[0],),
    )
    random_erasing: float = option(
        0.0,
        bounds.probability,
        "probability that a box is filled with noise (timm's reprob, mode pixel)",
        neutral=(0.0,),
        reads_with=_TRANSFORMED,
    )
    crop_padding_mode: str = option(
        "zero",
        str,
        "what lies around an image in memory when it is cropped at random: black, grey (127) or "
        "its own mirror image",
        choices=("zero", "grey", "reflect"),
        reads_with=(
            ReadWith(
                "auto_augment",
                one_of(None),
                "timm's policy crops inside the image: use no --auto-augment",
            ),
        ),
    )


@dataclass(frozen=True)
class BatchOptions:
    """How many samples an update takes, and how they fit in memory."""

    global_batch_size: int | Literal["auto"] = option(
        512,
        bounds.samples_or_auto,
        "samples an update, over all ranks; experimental: auto grows it with the critical batch, "
        "from --min-batch-size to --max-batch-size",
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
    )
    norm_batch_size: int | Literal["frozen"] | None = option(
        None,
        bounds.norm_samples,
        "samples BatchNorm sees at once, or 'frozen'",
        shown="32, at most the global batch and the training set",
    )
    bn_statistics: Literal["per_ghost", "per_update"] = option(
        "per_ghost",
        str,
        "running statistics move once a ghost batch or once an update",
        choices=("per_ghost", "per_update"),
        reads_with=(_ROLLING,),
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
    memory_format: str = option(
        "contiguous",
        str,
        "of weights and images",
        choices=("contiguous", "channels_last", "auto"),
        contract=False,
        plan=True,
    )
    precision: str | None = option(
        None,
        str,
        "of the forward pass; fp64 proves a plan",
        choices=("fp32", "bf16", "fp16", "fp64"),
        shown="the launcher's, else fp32",
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
