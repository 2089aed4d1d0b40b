"""The two errors that the command line prints without a traceback."""


class InputError(ValueError):
    """What the user gave cannot be done (exit code 2): what was given, the rule, what to type."""


class RunFailed(RuntimeError):
    """The run could not go on (exit code 1): where it stood, and what was kept."""
