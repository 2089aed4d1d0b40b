"""The settings of torchvision's reference flags that the contract cannot express."""

from __future__ import annotations

from typing import Any

from lbaccel.recipe.values import shown
from lbaccel.replication.many_gpus import Gap
from lbaccel.replication.readers.torchvision_names import AUGMENT


def gaps_of(a: dict[str, Any]) -> list[Gap]:
    """From the flags' values, by their names with underscores."""
    gaps = [
        Gap(
            "the initial weights",
            "timm's network of that name has timm's own initialisation",
            "timm's (in ResNets the last gain of a block starts at 0, in torchvision's at 1)",
        )
    ]
    norm, wd = a["norm_weight_decay"], a["weight_decay"]
    if norm is not None and norm != wd:
        if norm:
            gaps.append(
                Gap(
                    f"--norm-weight-decay {shown(norm)}",
                    "lbaccel knows decay on norms and biases or none",
                    "no decay on them",
                )
            )
        if a["bias_weight_decay"] != norm:
            gaps.append(
                Gap(
                    "weight decay on the biases of layers that are no norm",
                    "lbaccel leaves out norms and biases together",
                    "no decay on them (a ResNet has one such bias, the classifier's)",
                )
            )
    if a["bias_weight_decay"] not in (None, wd, norm):
        gaps.append(
            Gap(
                f"--bias-weight-decay {shown(a['bias_weight_decay'])}",
                "lbaccel knows decay on norms and biases or none",
                "that of --norm-weight-decay",
            )
        )
    if a["transformer_embedding_decay"] not in (None, wd):
        gaps.append(
            Gap(
                f"--transformer-embedding-decay {shown(a['transformer_embedding_decay'])}",
                "timm's own list of parameters without decay holds",
                "timm leaves out position embeddings and class tokens",
            )
        )
    if a["opt"].lower() == "rmsprop":
        gaps.append(Gap("RMSprop's eps 0.0316", "lbaccel sets no eps", "torch's 1e-8"))
    if a["mixup_alpha"] or a["cutmix_alpha"]:
        gaps.append(
            Gap(
                "one lambda and a neighbour for a GPU's whole batch in mixup and cutmix",
                "lbaccel draws lambda for each sample, and sample i of a ghost batch meets sample "
                "g - 1 - i",
                "the same alphas; where both are on, each with probability 1/2, as there",
            )
        )
    if a["auto_augment"] not in (None, "imagenet"):
        gaps.append(
            Gap(
                f"--auto-augment {a['auto_augment']}",
                "lbaccel has timm's policies, which are others",
                AUGMENT.get(a["auto_augment"], "auto_augment with a policy of timm's"),
            )
        )
    if a["random_erase"]:
        gaps.append(
            Gap(
                f"--random-erase {shown(a['random_erase'])} with a box of zeros",
                "timm's random erasing fills the box with noise",
                "random_erasing of the same probability and sizes",
            )
        )
    if a["val_crop_size"] != a["train_crop_size"]:
        gaps.append(
            Gap(
                f"--val-crop-size {a['val_crop_size']} beside --train-crop-size "
                f"{a['train_crop_size']}",
                "the recipe trains and evaluates at one img_size",
                f"evaluation at {a['train_crop_size']} px; timm's validate.py --img-size "
                f"{a['val_crop_size']} --crop-pct {a['val_crop_size'] / a['val_resize_size']:.4g} "
                "measures the checkpoint as torchvision would",
            )
        )
    if a["interpolation"] not in ("bilinear", "bicubic"):
        gaps.append(
            Gap(
                f"--interpolation {a['interpolation']}",
                "the recipe has bilinear and bicubic",
                "the model's",
            )
        )
    if a["resume"]:
        gaps.append(
            Gap(
                f"--resume {a['resume']}",
                "a run of torchvision's can't be gone on with",
                "a fresh start",
            )
        )
    return gaps
