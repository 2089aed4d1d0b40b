"""Learn where masked tensors hold their samples, before the first update and where rates change."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from lbaccel.batch.plan import MicroBatch
from lbaccel.randomness.generators import seed_generators
from lbaccel.randomness.layouts import Layouts, NotLearned, learn_layouts
from lbaccel.randomness.masks import KeyedRandomness
from lbaccel.update.accumulation import LossFn
from lbaccel.update.averages import RunningAverages
from lbaccel.update.memory.oom import is_out_of_memory
from lbaccel.update.normalization import GhostNorm

RATES = ("p", "prob")  # and all whose name holds "drop"


class MaskLayouts:
    """The `Layouts` of a `KeyedRandomness`, learned on the first samples of an update.

    They are learned where the network has a rate of dropout or drop-path above 0, and anew where
    such a rate or a module's mode changes: that decides which calls there are. A call that no
    module shows (`F.dropout` with a rate of its own) ends its attempt, which is done again.

    Args:
        model: as `loss_fn` gets it.
        module: the network inside, whose layers are named.
        randomness: takes the layouts.
        norm: BatchNorm's statistics, which take nothing from these samples.
        averages: declared ones, which take nothing either.
        always: learn even where no rate shows: an attempt can't be done again.
    """

    def __init__(
        self,
        model: Any,
        module: nn.Module,
        *,
        randomness: KeyedRandomness,
        norm: GhostNorm,
        averages: RunningAverages,
        always: bool = False,
    ) -> None:
        self.model, self.module, self.always = model, module, always
        self.randomness, self.norm, self.averages = randomness, norm, averages
        self._rates = [(m, name) for m in module.modules() for name in _rates_of(m)]
        self._learned_at: Any = None
        self._calls_unseen = False  # by any rate: some came all the same
        self._given_up = False
        self._unsaid: list[str] = []
        randomness.must_learn = not always

    def begin(self) -> None:
        """Forget what an attempt met that failed for a reason of its own."""
        if self._unsaid:
            self._learned_at, self._given_up, self._unsaid = None, False, []
            self.randomness.must_learn = not self.always

    def learn(
        self, loss_fn: LossFn, micro_batch: MicroBatch, data: Any, *, always: bool = False
    ) -> None:
        """Learn the layouts, unless they are those of the rates as they stand.

        Args:
            loss_fn: as for `LargeBatch.update`.
            micro_batch: whose samples are taken.
            data: of it, on the device.
            always: learn even where no rate shows.
        """
        rates = [m.training and getattr(m, name, 0) for m, name in self._rates]
        if rates == self._learned_at or self._given_up:
            return
        randomness, always = self.randomness, always or self.always or self._calls_unseen
        if self._learned_at is None and not (always or any(rates)):
            return
        self._learned_at, randomness.layouts = rates, None
        try:
            randomness.layouts = learn_mask_layouts(
                self.model, loss_fn, data,
                num_samples=micro_batch.num_samples,
                module=self.module, randomness=randomness, norm=self.norm, averages=self.averages,
            )  # fmt: skip
        except Exception as error:
            if is_out_of_memory(error) and micro_batch.num_samples > 3:
                self._learned_at = None
                raise
            self._by_rows(str(error) or type(error).__name__)
            return
        self._unsaid = list(randomness.layouts.not_known)

    def forget(self, error: NotLearned, *, again: bool) -> None:
        """Learn anew after a micro-batch that called for other masks; `again` gives it up."""
        self._learned_at, self.randomness.layouts, self._calls_unseen = None, None, True
        if again:
            self._by_rows(str(error))

    def say(self) -> None:
        """Warn of masks that no plan repeats, once: after a forward pass that went well."""
        for text in self._unsaid:
            _warn(text)
        self._unsaid = []

    def _by_rows(self, why: str) -> None:
        self.randomness.layouts, self.randomness.must_learn = None, False
        self._given_up, self._unsaid = True, [why]


def learn_mask_layouts(
    model: Any,
    loss_fn: LossFn,
    data: Any,
    *,
    num_samples: int,
    module: nn.Module,
    randomness: KeyedRandomness,
    norm: GhostNorm,
    averages: RunningAverages,
) -> Layouts:
    """The `Layouts` of a network on samples of a micro-batch; statistics and generators stay."""

    def run(few: Any, count: int) -> None:
        seed_generators(0, randomness.device)
        micro_batch = MicroBatch(0, (count,))
        with torch.no_grad(), norm.forward(micro_batch), averages.forward(micro_batch):
            loss_fn(model, few)

    averages.begin(module, loss_fn)
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again in the update
            return learn_layouts(
                run, randomness.watching, data=data, num_samples=num_samples, model=module
            )
    finally:
        norm.begin()
        averages.begin(module, loss_fn)  # what these samples added up is let go
        torch.clear_autocast_cache()  # casts made without gradients


def _rates_of(module: nn.Module) -> list[str]:
    """Names of a module's own attributes that are rates of dropout or drop-path."""
    return [
        name
        for name, value in vars(module).items()
        if isinstance(value, (int, float))
        and not isinstance(value, bool)
        and (name in RATES or "drop" in name.lower())
    ]


def _warn(text: str) -> None:
    warnings.warn(
        f"masks of dropout or drop-path depend on the micro-batch, so another plan trains with "
        f"other ones of the same distribution: {text}. Give the tensor its samples in a dimension "
        "of their own, or set that rate to 0; verify(model, loss_fn, batch) shows the difference.",
        stacklevel=2,
    )
