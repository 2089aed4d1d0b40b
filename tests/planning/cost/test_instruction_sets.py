"""The tests of prediction, once more under an older instruction set than the processor has."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
# oneDNN takes the variable on x86 alone; elsewhere these tests run a second time as they are.
OLDER = "AVX2" if torch.backends.cpu.get_cpu_capability() == "AVX512" else "SSE41"
PREDICTION = (
    "planning/cost/test_kernel_memory",
    "planning/cost/test_trace",
    "planning/cost/test_chain",
    "planning/test_measure",
)
WORKSPACES = """
import torch
torch.set_num_threads(1)
from test_kernel_memory import convolution
from lbaccel.planning.cost.kernel_memory import measured_workspace
for kernel, channels in ((1, 24), (3, 24), (3, 512)):
    for layout in ("contiguous", "channels_last"):
        for name, args in convolution(20, channels, channels, kernel, 8, layout=layout).items():
            print(measured_workspace(name, args))
"""


def child(*command: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_predictions_hold_under_an_older_instruction_set():
    files = [f"tests/{name}.py" for name in PREDICTION]
    said = child("-m", "pytest", "-q", "-p", "no:cacheprovider", *files, ONEDNN_MAX_CPU_ISA=OLDER)
    passed = re.search(r"(\d+) passed", said)
    assert passed and int(passed[1]) > 100
    assert "failed" not in said and "skipped" not in said


@pytest.mark.slow
def test_the_older_instruction_set_has_other_workspaces():
    """Else the test above would show nothing."""
    path = os.pathsep.join([str(Path(__file__).parent), str(ROOT / "tests" / "helpers")])
    native = child("-c", WORKSPACES, PYTHONPATH=path, ONEDNN_MAX_CPU_ISA="DEFAULT")
    older = child("-c", WORKSPACES, PYTHONPATH=path, ONEDNN_MAX_CPU_ISA=OLDER)
    assert native.count("\n") == older.count("\n") == 12
    assert native != older or platform.machine() not in ("x86_64", "AMD64")
