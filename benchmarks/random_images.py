"""Images and labels at random, and the loss, for benchmarks that measure an update."""

from __future__ import annotations

import torch
from torch.nn import functional as F


class Images:
    """A data set that makes whole micro-batches."""

    def __init__(self, count, size, channels=3):
        self.images = torch.randn(count, channels, size, size)
        self.labels = torch.randint(10, (count,))

    def __len__(self):
        return len(self.images)

    def fetch(self, indices, epochs):
        rows = torch.tensor(indices)
        return self.images[rows], self.labels[rows]

    __lbaccel_fetch__ = fetch  # for the loader


def loss_fn(model, batch):
    images, labels = batch
    return F.cross_entropy(model(images), labels)
