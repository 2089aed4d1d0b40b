"""ZeRO with frozen parameters: the update of one process, and nothing left gathered."""

from __future__ import annotations

import os

import forks
import pytest
import torch

pytest.importorskip("deepspeed", reason="not run: pip install 'lbaccel[deepspeed]'")


def forked(rank, stage, method):
    os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    import zero_frozen

    return zero_frozen.run(stage, method)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the parent's DeepSpeed has taken the GPU")
@pytest.mark.parametrize(
    ("stage", "method"), [(0, "head"), (2, "bias+head"), (3, "head"), (3, "head+norms")]
)
def test_frozen_parameters_under_recompute_give_the_update_of_one_process(stage, method):
    """Under ZeRO-3 a recompute gathers them again: after the update none may be left whole."""
    found = forks.values(forks.run_forked(forked, stage, method, world_size=2, timeout=300))
    for error, gathered in found:
        assert error < 1e-4
        assert gathered == [[]] * 3
