"""Progress and peak memory, on a platform that has no `resource` too."""

from __future__ import annotations

import subprocess
import sys

WITHOUT_RESOURCE = """
import json, math, sys
import torch

sys.modules["resource"] = None  # importing it fails, as on Windows
torch.cuda.is_available = lambda: False
from types import SimpleNamespace

from lbaccel.batch.stream import UpdateStream
from lbaccel.runs.folder import strict_json
from lbaccel.runs.length import Length
from lbaccel.runs.log import RunLog
from lbaccel.runs.notices import Circumstances, LossNotices
from lbaccel.runs.progress import Progress, closing_table, peak_gib

assert math.isnan(peak_gib())
stream = UpdateStream(4, 8, "keep")
length = Length(SimpleNamespace(stream=stream), epochs=1)
notices = LossNotices(Circumstances(10, 8, None, False, False, 0.1))
log = RunLog(stream, log_every=1, eval_every=1, length=length, notices=notices)
result = SimpleNamespace(
    loss=1.0, num_samples=4, num_updates=2, samples_seen=8, grad_norm=1.0, micro_batch_size=4,
    dropped=False, sums={},
)
metrics = log.after_update(result, lr=0.1, seconds=1.0, more=dict)
line = json.loads(strict_json(metrics))
assert line["memory/peak_gib"] is None and line["train/loss"] == 1.0
Progress(length, True).show(2, {"epoch": 1.0, **metrics})
summary = log.summary(SimpleNamespace(num_updates=2, samples_seen=8))
assert json.loads(strict_json(summary))["peak_gib"] is None
print(closing_table({**summary, "best_val_top1": None, "best_update": None}))
print(closing_table({**json.loads(strict_json(summary)), "train_loss": 1.0}))
"""


def test_where_the_platform_has_no_resource_peak_memory_is_unknown_and_nothing_fails():
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_RESOURCE], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "peak -" in done.stdout.splitlines()[0]
    assert done.stdout.count("peak memory                  -") == 2
