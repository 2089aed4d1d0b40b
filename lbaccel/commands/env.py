"""`lbaccel env`: this machine and its versions, to paste into a bug report."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from lbaccel.runs.bug_report import bug_report
from lbaccel.runs.columns import columns
from lbaccel.runs.folder import strict_json
from lbaccel.text import in_code_block


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `lbaccel env`."""
    parser.description = (
        "Versions, processor, devices, accelerate's default config and environment variables, as a "
        "block for a bug report. Keys and tokens are not shown, and the home folder is ~."
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the report; 0."""
    found = bug_report()
    if args.json:
        print(strict_json(found, indent=2))
    else:
        print(in_code_block("text", "\n".join(columns(_rows(found)))))
    return 0


def _rows(found: dict[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in found.items():
        if isinstance(value, dict):
            yield from _rows(value, f"{before}{name}.") if value else [(f"{before}{name}", "none")]
        elif isinstance(value, list):
            yield f"{before}{name}", "; ".join(map(str, value)) or "none"
        else:
            yield f"{before}{name}", "none" if value is None else str(value)
