"""The recipe's options on model and data: a class a group, a row a setting (no torch)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lbaccel.network_arguments import network_arguments
from lbaccel.recipe import bounds
from lbaccel.recipe.values import (
    ReadWith,
    is_set,
    none_of,
    numbers,
    one_of,
    option,
    switch,
    word_or_numbers,
)

_MEMORY = ("digits", "cifar10", "cifar100")
_TAUGHT = ReadWith("teacher", is_set, "Use --teacher, such as runs/NAME")
# timm's training transform is for files, and for images in memory where it has a policy
_TRANSFORMED = (
    ReadWith("data", none_of(*_MEMORY), "Use images in files, such as folder:PATH"),
    ReadWith("auto_augment", is_set, "Use --auto-augment, under which they take timm's crop"),
)


def _is_from_outside(data: str) -> bool:
    return data.partition(":")[0] not in ("digits", "cifar10", "cifar100", "synthetic")


@dataclass(frozen=True)
class ModelOptions:
    """The backbone, and the weights it starts from."""

    model: str = option("resnet10t", str, "any timm model", common=True)
    pretrained: bool = option(
        False, switch, "start from timm's weights, or from --checkpoint", common=True
    )
    checkpoint: str | None = option(
        None, str, "weights file (.safetensors, .pth) to start from", common=True
    )
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
        common=True,
    )
    num_classes: int | None = option(None, bounds.classes, "outputs", shown="the data's classes")
    drop_rate: float = option(0.0, bounds.below_one, "dropout before the classifier, probability")
    drop_path: float = option(0.0, bounds.below_one, "stochastic depth, probability")
    model_kwargs: Mapping[str, Any] | None = option(
        None,
        network_arguments,
        "arguments of the network itself, as timm has them: stem=8 'widths=(8,16,32)'",
        shown="none",
        repeatable=True,
        says_where=True,
    )
    zero_init_last: bool | None = option(
        None,
        switch,
        "each residual block begins as the identity: the gain of its last BatchNorm starts at 0 "
        "(timm's ResNets do, torchvision's do not)",
        shown="the model's own",
        reads_with=(
            ReadWith(
                "pretrained", one_of(False), "Its weights take the place of those it starts with"
            ),
        ),
    )


@dataclass(frozen=True)
class DataOptions:
    """Images, and what is done to them."""

    data: str = option(
        "digits",
        str,
        "digits, cifar10, cifar100, folder:PATH, parquet:PATH, csv:FILE, hf:OWNER/NAME[:split], "
        "timm:PATH or synthetic[:CLASSESxSIZE]",
        common=True,
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
    max_train_samples: int | None = option(
        None,
        bounds.count,
        "training images to take, in proportion to the classes, the same for every seed; what is "
        "held out is so before",
        shown="all",
    )
    max_val_samples: int | None = option(
        None, bounds.count, "validation images to take, likewise", shown="all"
    )
    test_split: str = option(
        "test",
        str,
        "what a test set (test/, test-*.parquet) is where there is no validation set beside it: "
        "test, which training never touches, or val; unused: validation is held out of the "
        "training images in any case",
        choices=("test", "val", "unused"),
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
    decoder: str | None = option(
        None,
        str,
        "how image files become pixels: fast (cropped, resized and coloured as bytes, a "
        "micro-batch's draws at once), draft (the same, and a JPEG much larger than its crop needs "
        "is decoded at 1/2, 1/4 or 1/8 of its size), or pillow (timm's own transform, an image at "
        "a time)",
        choices=("fast", "draft", "pillow"),
        shown="fast; pillow beside a policy",
        reads_with=(
            ReadWith("data", none_of(*_MEMORY), "Its images are in memory: use folder:PATH"),
        ),
        before="pillow",
    )
    skip_corrupt: bool = option(
        False,
        switch,
        "read all images first, leave out those that can't be read, and list them in "
        "skipped.json of the run",
        reads_with=(
            ReadWith("data", _is_from_outside, "Its images can all be read: use folder:PATH"),
        ),
    )
    workers: int = option(
        2, bounds.workers, "processes that load image files, per rank", contract=False
    )
    cache_images: str | None = option(
        None,
        str,
        "keep decoded images in memory, at most so much for all ranks and workers of a machine, "
        "such as 2GiB: later epochs don't decode them again; no effect on the result",
        shown="none are kept",
        contract=False,
        reads_with=(
            ReadWith("data", none_of(*_MEMORY), "Its images are in memory: use folder:PATH"),
        ),
    )
    img_size: int | None = option(
        None,
        bounds.pixels,
        "pixels a side",
        shown="small images: their own; else the model's",
        common=True,
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
    teacher: str | None = option(
        None,
        str,
        "learn from a trained network beside the labels: a run, a checkpoint, an export or "
        "hf-hub:OWNER/NAME, of the same classes and image size",
        shown="none",
        reads_with=(ReadWith("loss", one_of("ce"), "Use --loss ce"),),
    )
    distill_alpha: float = option(
        0.5,
        bounds.share,
        "share of the teacher in the loss; the labels have the rest",
        reads_with=(_TAUGHT,),
    )
    distill_temperature: float = option(
        4.0,
        bounds.temperature,
        "T that the logits of teacher and network are divided by",
        reads_with=(_TAUGHT,),
    )
    label_smoothing: float = option(0.0, bounds.below_one, "0..1")
    mixup: float = option(0.0, bounds.not_negative, "alpha; 0 is off")
    cutmix: float = option(0.0, bounds.not_negative, "alpha; 0 is off")
    aug_repeats: int = option(
        1,
        bounds.count,
        "samples of an update that are one image, each augmented by draws of its own; an epoch "
        "keeps its number of samples",
    )
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

    @property
    def decoder_used(self) -> str:
        """`decoder`, or the fast one but for timm's policies, which work on Pillow's images."""
        return self.decoder or ("fast" if self.auto_augment is None else "pillow")
