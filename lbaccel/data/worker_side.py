"""The work of a loader's workers: samples and micro-batches by their keys, failures as values."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from lbaccel.data.slots import SHAPE, Slots, loaded
from lbaccel.errors import InputError
from lbaccel.randomness.keys import keyed_hash

SAMPLE_SEED = 0x5EED
LOAD = "__lbaccel_load__"  # of a data set whose workers make whole micro-batches


class KeyedSamples:
    """A map-style data set whose item (epoch, index) draws from generators seeded by that key."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: list[tuple[int, int]]) -> list[Any]:
        generator = torch.default_generator
        state = generator.get_state(), np.random.get_state(), random.getstate()
        try:
            return [self._item(*key) for key in keys]
        finally:
            generator.set_state(state[0])
            np.random.set_state(state[1])
            random.setstate(state[2])

    def _item(self, epoch: int, index: int) -> Any:
        seed = int(keyed_hash(self.seed, SAMPLE_SEED, epoch, index))
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed & 0xFFFFFFFF)
        random.seed(seed)
        try:
            return self.dataset[index]
        except InputError as error:
            return LoadFailure(str(error))
        except (OSError, SyntaxError) as error:  # what PIL raises for a file that is no image
            samples = getattr(self.dataset, "samples", None)
            name = f" ({samples[index][0]})" if samples else ""
            return LoadFailure(f"sample {index}{name} can't be read: {error}.")


class KeyedBatches:
    """The micro-batches that a data set makes whole, of lists of keys (epoch, index)."""

    def __init__(self, dataset: Any, slots: Slots | None = None) -> None:
        self.load, self.slots = getattr(dataset, LOAD), slots
        self.shape: tuple[int, ...] = getattr(dataset, SHAPE, ())

    def __getitems__(self, keys: list[tuple[int, int]]) -> Any:
        epochs, indices = np.array(keys, dtype=np.int64).T
        try:
            load = partial(self.load, indices, epochs)
            return loaded(load, self.slots, (len(keys), *self.shape))
        except InputError as error:
            return LoadFailure(str(error))


def as_it_is(batch: Any) -> Any:
    """A batch that is made already."""
    return batch


@dataclass(frozen=True)
class LoadFailure:
    """An InputError on its way out of a worker, where a raise would drown it in a traceback."""

    message: str


class Collate:
    """`collate_fn`, but a batch with a failure is that failure."""

    def __init__(self, collate_fn: Callable[[list[Any]], Any]) -> None:
        self.collate_fn = collate_fn

    def __call__(self, samples: list[Any]) -> Any:
        """The batch of these samples, or the first failure among them."""
        for sample in samples:
            if isinstance(sample, LoadFailure):
                return sample
        return self.collate_fn(samples)


def checked(data: Any) -> Any:
    """A batch out of a worker.

    Raises:
        InputError: it is a failure.
    """
    if isinstance(data, LoadFailure):
        raise InputError(data.message)
    return data
