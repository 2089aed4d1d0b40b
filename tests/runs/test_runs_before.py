"""A run that an earlier lbaccel began goes on here, and ends as that lbaccel would have ended it.

`fixtures/before_the_house/` holds runs of commit 659eb0e, in float64: `broken` was interrupted
within an epoch, `whole` came to its end without a break. Checkpoint, settings, metrics and summary
are as that commit wrote them. Each `--resume` here continues from its bytes; the end is compared to
1e-9, since processors round the sums of a convolution in their own order (on the processor that
wrote them the two are equal to the bit).
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs_of_recipe import newest, rows, tensors
from safetensors.torch import load_file

from lbaccel import train
from lbaccel.data import order

BEFORE = Path(__file__).parent.parent / "fixtures" / "before_the_house"
NEW = {"train/top1"}  # which that lbaccel did not count


@pytest.mark.parametrize("most_sorted", [order.MOST_SORTED, 100], ids=["small", "large"])
@pytest.mark.parametrize("name", ["plain", "grown"])
def test_a_run_of_before_ends_as_it_would_have(name, most_sorted, tmp_path, monkeypatch):
    """Also on a set that is large by today's rule of order (1,438 images are, above 100)."""
    monkeypatch.setattr(order, "MOST_SORTED", most_sorted)
    run = tmp_path / "run"
    shutil.copytree(BEFORE / name / "broken", run, symlinks=True)
    begun = rows(run)
    assert train.main(["--resume", str(run)]) == 0
    truth = BEFORE / name / "whole"
    found, expected = rows(run), rows(truth)
    assert found[: len(begun)] == begun  # lines of before stay as they are
    assert [line.keys() - NEW for line in found] == [line.keys() for line in expected]
    for line, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            if isinstance(value, float):
                value = pytest.approx(value, rel=1e-9, abs=1e-9)
            assert line[key] == value, (line, key)
    ours, values = tensors(run), tensors(truth)
    assert ours.keys() == values.keys()
    for key, value in values.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-9, atol=1e-9, msg=key)
    assert any("momentum" in key or "exp_avg" in key for key in values)


@pytest.mark.parametrize("name", ["plain", "grown"])
def test_the_runs_of_before_hold_what_would_be_lost(name):
    """The comparison above can fail: half the run is still to do, and it moves the weights."""
    broken, whole = BEFORE / name / "broken", BEFORE / name / "whole"
    assert len(rows(broken)) < len(rows(whole))
    before, after = (load_file(newest(f) / "model.safetensors") for f in (broken, whole))
    assert all(before[key].dtype == torch.float64 for key in before if "num_batches" not in key)
    assert max((before[key] - after[key]).abs().max().item() for key in before) > 1e-3
