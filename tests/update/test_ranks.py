"""Two and three real gloo ranks: the same update as one process, and one transaction for all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forks
import pytest

FAST = ("resnet10t", "vit_tiny_patch16_224")
REST = "mobilenetv2_050,efficientnet_b0,convnext_atto,regnetx_002,seresnet18,resnet18_gn"


def launch(world_size: int, names: str) -> dict:
    environment = {
        **os.environ,
        "PYTHONPATH": forks.PYTHONPATH,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).parent / "ranks.py"
    command += ["--nproc_per_node", str(world_size), str(script), names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert done.returncode == 0 and len(lines) == 1, done.stdout + done.stderr
    return json.loads(lines[0].removeprefix("RESULT "))


def check(result: dict, world_size: int) -> None:
    assert result["world_size"] == world_size
    for name, error in result["cells"].items():
        assert error < 1e-12, f"{name} on {world_size} ranks: {error:.1e}"
    checks = result["checks"]
    assert checks["token_weights"] < 1e-12
    seen = checks["samples"]
    assert sorted(i for rank in seen for i in rank) == list(range(8))
    assert all(rank for rank in seen)
    for rank, (raised, unchanged, applied, moved, updates) in enumerate(checks["failing_rank"]):
        if rank == world_size - 1:
            assert raised == "ZeroDivisionError"
        else:
            assert f"rank {world_size - 1}: ZeroDivisionError: as it happens" in raised
        assert (unchanged, applied, moved, updates) == (True, True, True, 1)


def forked(rank: int, name: str) -> dict:
    import ranks

    return ranks.results([name])


@pytest.mark.parametrize("name", FAST)
def test_two_ranks_give_the_update_of_one_process(name):
    found = forks.values(forks.run_forked(forked, name, world_size=2, timeout=600))
    assert found[0] == found[1]
    check(found[0], 2)


@pytest.mark.slow
def test_three_ranks_with_a_filler_give_the_update_of_one_process():
    check(launch(3, "resnet10t"), 3)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 3])
def test_every_network_of_the_matrix_on_several_ranks(world_size):
    check(launch(world_size, REST), world_size)
