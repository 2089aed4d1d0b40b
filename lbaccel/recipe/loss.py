"""The loss of the recipe, with class weights or of each class by itself, and its hits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lbaccel.update.accumulation import LossFn

HITS = "top1"  # of `UpdateResult.sums`: samples whose largest logit is their label's


def loss_of(
    name: str,
    *,
    dtype: torch.dtype,
    memory_format: str,
    label_smoothing: float,
    class_weights: Tensor | None = None,
) -> LossFn:
    """The loss function of a run, for `LargeBatch.update`.

    With logits z of n samples in C classes, p = softmax(z), smoothed targets t of labels y and
    class weights w, the losses of a micro-batch and the weights that it counts by are

        ce    -sum_i sum_c w_c t_ic log p_ic / W,    W = sum_i w_(y_i), and n for soft targets
        bce   the mean over i and c of -t_ic log s_ic - (1 - t_ic) log(1 - s_ic),  s = sigmoid(z)

    `ce` is `torch.nn.functional.cross_entropy`: the weighted mean over micro-batches is its mean
    over the whole batch, class weights and soft targets included. `bce` is timm's
    `BinaryCrossEntropy` without its options: targets are 1 - s + s / C and s / C under a smoothing
    of s, and the mean is over samples and classes (Wightman et al. 2021, arXiv 2110.00476).

    Of hard labels it hands on how many samples the logits have right. A sample that is mixed of two
    has no one label, so there is nothing to count under mixup and cutmix.

    Args:
        name: "ce" or "bce".
        dtype: of images and soft targets.
        memory_format: of images, "contiguous" or "channels_last".
        label_smoothing: s; soft targets come smoothed.
        class_weights: w [C], on the device of the logits; of `ce` alone.
    """

    def loss_fn(model: Any, micro_batch: Any) -> Any:
        images, targets = micro_batch
        images = images.to(dtype)
        if memory_format == "channels_last":
            images = images.to(memory_format=torch.channels_last)
        logits = model(images)
        if targets.is_floating_point():  # soft targets of mixup, smoothed already
            return _loss(name, logits, targets.to(dtype), class_weights, 0.0)
        loss = _loss(name, logits, targets, class_weights, label_smoothing)
        weight = None if class_weights is None else class_weights[targets].sum()
        hits = (logits.detach().argmax(1) == targets).sum()
        return loss, weight, {HITS: hits}

    return loss_fn


def _loss(
    name: str, logits: Tensor, targets: Tensor, weights: Tensor | None, smoothing: float
) -> Tensor:
    if name == "ce":
        weights = None if weights is None else weights.to(logits.dtype)
        return F.cross_entropy(logits, targets, weights, label_smoothing=smoothing)
    if not targets.is_floating_point():
        off = smoothing / logits.shape[1]
        labels, targets = targets, torch.full_like(logits, off)
        targets.scatter_(1, labels[:, None], 1 - smoothing + off)
    return F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype))
