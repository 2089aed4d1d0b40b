"""Sentences about a loss that goes wrong, each said once a run (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ABOVE_CHANCE = 1.5  # nats above ln(classes): a fresh head's first loss is near ln(classes)
TIMES_BEST = 2.0
WINDOW = 256.0  # samples; an update of more has little noise
_NUMBERS = ("sum", "weight", "best", "highest", "stable")  # of the state


@dataclass(frozen=True)
class Circumstances:
    """The facts of a run from which its first loss follows."""

    num_classes: int
    img_size: int
    own_img_size: int | None  # the size of the pretrained weights; None without such
    frozen: bool  # BatchNorm keeps its running statistics
    given_normalisation: bool  # --mean or --std was given
    base_lr: float
    loss: str = "ce"
    times_chance: float = 1.0  # with a teacher: 1 - alpha + alpha T^2, as its part has T^2 ln(C)


class LossNotices:
    """Tells of a first loss far above chance, and of a loss that diverges.

    With the loss l_u of update u of n samples and w = max(1/2, 1 - n / 256),

        s_u = w s_(u-1) + (1 - w) l_u,  divided by 1 - w^u

    diverges where s_u > max(2 min_v s_v, ln(classes) + 1.5). The first loss is far above chance
    where l_1 > ln(classes) + 1.5. The stable rate of the run itself is the largest of the updates
    that led to the best s_u.

    >>> notices = LossNotices(Circumstances(10, 32, None, False, False, 0.1))
    >>> warmup = [(2.3, 0.02), (1.9, 0.04), (1.8, 0.08), (18.0, 0.1), (197.0, 0.1)]
    >>> (text,) = filter(None, (notices.after_update(l, 512, lr=r) for l, r in warmup))
    >>> text[:80]
    'the loss diverges: rates up to 0.04 brought it down to 1.9, and it is 10.5 after'
    """

    def __init__(self, facts: Circumstances) -> None:
        self.facts = facts
        self.sum, self.weight, self.best = 0.0, 0.0, math.inf
        self.highest = self.stable = 0.0  # rates of all updates, and of those that led to the best
        self.said: list[str] = []

    @property
    def chance(self) -> float:
        """The loss of a network that knows nothing: ln(classes), or ln 2 for each class alone.

        With a teacher it is the most that this can be: KL(p || 1 / C) = ln(C) - H(p).
        """
        alone = math.log(2 if self.facts.loss == "bce" else max(2, self.facts.num_classes))
        return self.facts.times_chance * alone

    def after_update(self, loss: float, num_samples: int, *, lr: float) -> str | None:
        """Take the loss of an update in, which its step of rate `lr` followed.

        Returns a sentence where there is something to say.
        """
        first = self.weight == 0.0
        past = max(0.5, 1.0 - num_samples / WINDOW)
        self.sum = past * self.sum + (1 - past) * loss
        self.weight = past * self.weight + (1 - past)
        smoothed = self.sum / self.weight
        if smoothed < self.best:
            self.best, self.stable = smoothed, self.highest
        before, self.highest = self.highest, max(self.highest, lr)
        if first and loss > self.chance + ABOVE_CHANCE:
            return self._once("first", self._of_the_first(loss))
        if not first and smoothed > max(TIMES_BEST * self.best, self.chance + ABOVE_CHANCE):
            return self._once("diverges", self._of_divergence(smoothed, before))
        return None

    def _once(self, what: str, text: str) -> str | None:
        if what in self.said:
            return None
        self.said.append(what)
        return text

    def _of_the_first(self, loss: float) -> str:
        f, causes = self.facts, []
        if f.frozen:
            causes.append(
                "BatchNorm is frozen, and its running statistics may not fit these images (try "
                "--norm-batch-size 32)"
            )
        if f.own_img_size is not None and f.img_size != f.own_img_size:
            causes.append(
                f"images of {f.img_size} px, and the weights are of {f.own_img_size} px (try "
                f"--img-size {f.own_img_size})"
            )
        if f.given_normalisation:
            causes.append("--mean and --std were given, and the weights may have others")
        causes.append("timm starts the new classifier of some families with large weights")
        most = "" if f.times_chance == 1 else "at most "
        return (
            f"the first loss is {loss:.3g}, and guessing among {f.num_classes} classes has {most}"
            f"{self.chance:.3g}. Likely: {'; '.join(causes)}. A warmup helps: the loss should fall "
            "within it."
        )

    def _of_divergence(self, smoothed: float, highest: float) -> str:
        share = self.stable / highest if highest else 1.0
        if 0 < share < 0.9:
            found = f"rates up to {self.stable:.3g} brought it down to {self.best:.3g}"
        else:
            found, share = f"it was {self.best:.3g} at its best", 0.25
        return (
            f"the loss diverges: {found}, and it is {smoothed:.3g} after rates up to "
            f"{highest:.3g}. Stop the run and give --base-lr {self.facts.base_lr * share:.2g}, or "
            "--clip-grad-norm 1; lbaccel lr-find with the same settings measures the largest "
            "stable rate. It is said once."
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        numbers = {name: getattr(self, name) for name in _NUMBERS}
        return {**numbers, "said": list(self.said)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        for name in _NUMBERS:
            setattr(self, name, float(state.get(name, 0.0)))  # no rates before 0.2
        self.said = [str(word) for word in state["said"]]
