"""The table of all checks."""

from __future__ import annotations

from lbaccel.doctor import config_checks, environment_checks, script_checks
from lbaccel.doctor.check import Check
from lbaccel.doctor.facts import Facts, Finding

CHECKS: tuple[Check, ...] = (
    *environment_checks.CHECKS,
    *config_checks.CHECKS,
    *script_checks.CHECKS,
)


def diagnose(facts: Facts) -> list[Finding]:
    """Every finding of every check, in the order of the table."""
    return [finding for check in CHECKS for finding in check.run(facts)]
