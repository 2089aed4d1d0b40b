"""One check: a pure function of the facts, with what is known of its consequence and its cure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from lbaccel.doctor.facts import Facts, Finding

WHERE = "{where}"  # in a fix: the place of the finding
Look = Callable[[Facts], Iterable[tuple[str, str]]]
"""Facts -> (where, what was found) of each case."""


@dataclass(frozen=True)
class Check:
    """One check. `consequence` was measured, unless its text says that it was read in a source."""

    name: str
    consequence: str
    fix: str
    look: Look

    def run(self, facts: Facts) -> Iterator[Finding]:
        """The findings of this check."""
        for where, found in self.look(facts):
            yield Finding(
                check=self.name,
                where=where,
                found=found,
                consequence=self.consequence,
                fix=self.fix.replace(WHERE, shlex.quote(where)),
            )
