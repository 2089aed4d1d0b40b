"""The `lbaccel` command: one subcommand a task."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from lbaccel.errors import InputError, RunFailed

USAGE = """usage: lbaccel COMMAND ...

  train      train or finetune a timm backbone at a global batch that does not fit
  schedule   a batch-size schedule: batch, learning rate and updates from each epoch on
  lr-find    which learning rates a recipe bears at its global batch; changes nothing
  plan       does a batch fit, what is the fastest way to fit it, what would each lever buy
  configs    the launcher's files: list, copy, explain, or make them for a plan
  doctor     what is known to go wrong with this environment, config and script
  compare    finished runs side by side: what differed, and what came of it
  export     a run as a folder that timm and the Hugging Face hub load, with a model card
  verify     a gradient check: is an update of this model the same however it is cut?
  transfer   a recipe's hyper-parameters moved to another global batch, each by its rule
  replicate  a recipe made for many GPUs, as the contract of one card
  advise     how large should the batch be, by the noise of a run's gradients
  calibrate  what this machine's device reaches in each class of kernel, for plans

lbaccel COMMAND --help says more.
"""


# subcommand: its module, imported when it is called
COMMANDS = {
    "advise": "commands.advise",
    "calibrate": "commands.calibrate",
    "compare": "runs.compare",
    "configs": "commands.configs",
    "doctor": "commands.doctor",
    "export": "commands.export",
    "plan": "commands.plan",
    "replicate": "commands.replicate",
    "schedule": "commands.schedule",
    "transfer": "commands.transfer",
    "verify": "commands.verify",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; returns the exit code (0 done, 1 failed, 2 input, 130 interrupted)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments else "--help"
    if command == "train":
        from lbaccel import train

        return train.main(arguments)
    if command == "lr-find":
        from lbaccel.commands import lr_find

        return lr_find.main(arguments)
    if command in COMMANDS:
        return _run(command, arguments)
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        from lbaccel import __version__

        print(f"lbaccel {__version__}")
        return 0
    print(f"error: no command {command!r}.\n\n{USAGE}", end="", file=sys.stderr)
    return 2


def _run(name: str, arguments: Sequence[str]) -> int:
    """A command of two functions: `add_arguments(parser)` and `run(namespace) -> exit code`."""
    command = import_module(f"lbaccel.{COMMANDS[name]}")
    parser = argparse.ArgumentParser(prog=f"lbaccel {name}", allow_abbrev=False)
    command.add_arguments(parser)
    try:
        return command.run(parser.parse_args(arguments))
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        return 130
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"run failed: {error}", file=sys.stderr)
        return 1
