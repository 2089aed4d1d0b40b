"""torch.compile around an update: a network compiled in place, and one that was compiled too late.

A compiled network trains as the plain one does, to rounding: BatchNorm's ghost batches are inside
of the graph, and so are the masks keyed by sample (`randomness/in_graph.py`).
"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lbaccel.errors import InputError

# torch compiles anew for each size of a micro-batch and each number of its ghost batches, and
# after so many it goes on uncompiled, in silence. A batch schedule has more than torch's 8.
MOST_VERSIONS = 64


def compile_in_place(model: nn.Module, device: torch.device) -> None:
    """Compile `model`; the names of its weights stay as they are, and copies of it are plain.

    Raises:
        InputError: torch has no compiler for the device.
    """
    _check_compiler(device)
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, MOST_VERSIONS)
    model.compile()


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise InputError(
                "--compile on a GPU needs triton, which is not installed. Install it "
                "(pip install triton), or leave --compile out."
            )
        return
    given = os.environ.get("CXX")
    if not any(shutil.which(name) for name in ((given,) if given else ("g++", "clang++"))):
        raise InputError(
            f"--compile on a CPU needs a C++ compiler, and there is no {given or 'g++ or clang++'} "
            "on this machine. Install one, or leave --compile out."
        )


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` was compiled in place."""
    return getattr(model, "_compiled_call_impl", None) is not None


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Inside, a compiled model runs uncompiled: an evaluation is not worth a compilation."""
    if not is_compiled(model):
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def warn_of_compiled(model: nn.Module) -> None:
    """Warn of a `torch.compile(model)` around the model that updates run, which do not run it."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    if dynamo is None or is_compiled(model):
        return
    compiled = [o for o in gc.get_objects() if type(o) is dynamo.OptimizedModule]
    if any(vars(o)["_modules"].get("_orig_mod") is model for o in compiled):
        warnings.warn(
            "torch.compile(model) was called after LargeBatch.prepare, so updates run the model "
            "that is not compiled. Call model.compile(), which compiles it in place, or "
            "torch.compile before prepare. (If the compiled one serves evaluation alone, all is "
            "well.)",
            stacklevel=4,
        )
