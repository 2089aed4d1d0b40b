"""The noise scale under DeepSpeed ZeRO-0 to 2 on two gloo ranks, and where it is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("deepspeed", reason="not run: pip install 'lbaccel[deepspeed]'")

from test_zero import launch


@pytest.mark.slow
def test_hooks_under_zero_see_what_autograd_gives_and_zero_3_is_refused():
    found = launch(2, "all", script="zero_noise.py")
    # float32 norms, and S is a difference of sums
    wrong = {name: error for name, error in found["cells"].items() if not error < 1e-4}
    assert len(found["cells"]) == 5 and not wrong, wrong
    assert "no rank sees a micro-batch's whole" in found["refused"]["ZeRO-3"]
    assert "a part of the optimizer's second moments" in found["refused"]["ZeRO-2, preconditioned"]
