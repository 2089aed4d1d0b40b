"""The processor that kernels run on, by name."""

from __future__ import annotations

import platform
from typing import Any

import torch

from lbaccel.launch import variables

_NAMES = {"AVX512": "AVX-512", "DEFAULT": platform.machine()}
LIMITS = (
    "ATEN_CPU_CAPABILITY",
    *("ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE"),
    *("DNNL_MAX_CPU_ISA", "DNNL_DEFAULT_FPMATH_MODE"),
)


def instruction_set() -> str:
    """The instructions that torch's CPU kernels are chosen for, and what the environment sets.

    Such as "AVX-512, AMX; ONEDNN_MAX_CPU_ISA=AVX2".
    """
    found = torch.backends.cpu.get_cpu_capability()
    words = [_NAMES.get(found, found)]
    if found == "AVX512" and torch.cpu._is_amx_tile_supported():
        words.append("AMX")
    limits = [f"{name}={value}" for name, value in sorted(variables(*LIMITS).items())]
    return "; ".join([", ".join(words), *limits])


def kernel_state() -> tuple[Any, ...]:
    """The state of this process on which the choice of an algorithm depends."""
    return (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        getattr(torch.backends.mkldnn, "deterministic", False),
        torch.are_deterministic_algorithms_enabled(),
        *_matmul_precision(),
    )


def _matmul_precision() -> tuple[str, ...]:
    """How exact products of float32 matrices are, as torch's settings say.

    torch refuses its older question once one of the newer settings was made.
    """
    try:
        return (torch.get_float32_matmul_precision(),)
    except RuntimeError:
        homes: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul)
        homes = (*homes, torch.backends.cudnn, getattr(torch.backends.mkldnn, "matmul", None))
        return tuple(str(getattr(home, "fp32_precision", None)) for home in homes)
