"""How every command ends, on every rank: its last line, its exit code, its processes."""

from __future__ import annotations

import sys
from collections.abc import Callable

from lbaccel.errors import InputError, RankFailed, RunFailed, is_of_the_disk, way_out
from lbaccel.launch import rank
from lbaccel.recipe.output import steady_output
from lbaccel.recipe.unforeseen import in_a_sentence
from lbaccel.text import printable, without_tokens


def ending(
    body: Callable[[], int | None],
    *,
    elsewhere: str = "write to another place",
    interrupted: str = "",
) -> int:
    """Run a command, and turn its way to end into a last line and an exit code.

    A return gives the body's own code, or 0. InputError gives 2, RunFailed 1, an OSError of the
    disk (full, no permission, defective) 1, and Ctrl-C 130. Any other error is a defect of
    lbaccel: it passes through with its traceback, unless `in_a_sentence` knows it (1 too). The
    process group is left in every case. Standard output that can't be written ends no command (see
    `steady_output`).

    Args:
        body: the command.
        elsewhere: what to type where the disk refuses, such as "give another --output".
        interrupted: what follows "interrupted." where the KeyboardInterrupt itself has no text.
    """
    with steady_output():
        try:
            return body() or 0
        except InputError as error:
            return fail(error, 2)
        except RunFailed as error:
            return fail(error, 1)
        except Exception as error:
            if isinstance(error, OSError) and is_of_the_disk(error):
                return fail(f"{error}. {way_out(error, elsewhere)}", 1)
            known = in_a_sentence(error)
            if known is error:
                raise
            return fail(known, 1)
        except KeyboardInterrupt as error:
            return fail(f"interrupted. {str(error) or interrupted}".rstrip(), 130)
        finally:
            end_process_group()


def fail(error: object, code: int) -> int:
    """Print the message on the first rank, as the last line, and return the exit code."""
    sys.stdout.flush()
    if rank() == 0 or isinstance(error, RankFailed):
        name = {2: "error", 1: "run failed"}.get(code)
        text = printable(without_tokens(str(error)))
        print(f"{name}: {text}" if name else text, file=sys.stderr, flush=True)
    return code


def end_process_group() -> None:
    """Leave the process group, if one was joined."""
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_initialized():
        dist.destroy_process_group()
